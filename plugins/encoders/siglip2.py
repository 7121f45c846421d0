"""The image tower of SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {
    "b": "vit_base_patch16_siglip_256.v2_webli",
    "l": "vit_large_patch16_siglip_256.v2_webli",
    "so400m": "vit_so400m_patch16_siglip_256.v2_webli",
    "g": "vit_giantopt_patch16_siglip_256.v2_webli",
}


@encoders.register("siglip2")
class SigLIP2(TimmEncoder):
    """SigLIP 2 ViT/16 patch tokens behind the final norm (D = 768, 1024, 1152 or 1536).

    As in iREPA (arXiv 2512.10794), except for the normalisation; REPA and REPA-E do not use it:

    - tokens: all tokens of the last block after the final norm, which is what the attention pool reads; it has no
      class token;
    - images: [0, 1], mean and deviation 0.5, with which it was trained (iREPA's code takes ImageNet's), then bicubic
      to 16 pixels per token: 256-pixel images with 16 x 16 tokens stay as they are;
    - activation: GELU in its tanh form, as in the authors' code (timm computes the exact one);
    - position embedding: that of the 16 x 16 grid, resampled where the denoiser's differs;
    - one vector per image: that of the attention pool.

    Args:
        size: ViT-B, L, So400m or g (giant-opt).
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's layout or OpenCLIP's of a timm model ("visual.trunk.*").
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "so400m", "g"] = "b",
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            MODELS[size],
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            options={"act_layer": "gelu_tanh"},
        )
