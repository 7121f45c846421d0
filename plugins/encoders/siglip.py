"""The image tower of SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {
    "b": "vit_base_patch16_siglip_256.webli",
    "l": "vit_large_patch16_siglip_256.webli",
    "so400m": "vit_so400m_patch14_siglip_224.webli",
}


@encoders.register("siglip")
class SigLIP(TimmEncoder):
    """SigLIP patch tokens behind the final norm (D = 768, 1024 or 1152).

    As in iREPA (arXiv 2512.10794), except for the normalisation; REPA and REPA-E do not use it:

    - tokens: all tokens of the last block after the final norm, which is what SigLIP's attention pool reads; it has
      no class token;
    - images: [0, 1], mean and deviation 0.5, with which SigLIP was trained (iREPA's code takes ImageNet's), then
      bicubic to one patch per token: B and L stay at 256 pixels for 16 x 16 tokens, so400m sees 224;
    - activation: GELU in its tanh form, as in the authors' code (timm computes the exact one);
    - position embedding: that of the 16 x 16 grid, resampled where the denoiser's differs;
    - one vector per image: that of the attention pool.

    Args:
        size: ViT-B/16, L/16 or So400m/14.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's layout or OpenCLIP's of a timm model ("visual.trunk.*").
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "so400m"] = "b",
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
