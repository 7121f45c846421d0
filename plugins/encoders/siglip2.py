"""Image tower of SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {
    "b": "vit_base_patch16_siglip_256.v2_webli",
    "l": "vit_large_patch16_siglip_256.v2_webli",
    "so400m": "vit_so400m_patch16_siglip_256.v2_webli",
    "g": "vit_giantopt_patch16_siglip_256.v2_webli",
}


@encoders.register("siglip2")
class SigLIP2(TimmEncoder):
    """SigLIP 2 ViT/16 patch tokens after the final norm (D = 768, 1024, 1152 or 1536).

    Follows iREPA (arXiv 2512.10794), except for the image normalization; REPA and REPA-E do not use SigLIP 2:

    - tokens: all tokens of the last block after the final norm, the input of the attention pool; SigLIP 2 has no class
      token;
    - images: scaled to [0, 1], normalized with mean and std 0.5 as SigLIP 2 was trained (iREPA's code uses
      ImageNet's), resized (bicubic) to 16 pixels per token; 256-pixel images with 16 x 16 tokens are not resized;
    - activation: tanh-approximated GELU, as in the authors' code (timm's default is exact GELU);
    - position embedding: trained on a 16 x 16 grid, resampled if the denoiser's grid differs;
    - image embedding: the output of the attention pool.

    Args:
        size: ViT-B, L, So400m or g (giant-opt).
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's layout or OpenCLIP's for timm models ("visual.trunk.*").
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "so400m", "g"] = "b",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        super().__init__(
            MODELS[size],
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            options={"act_layer": "gelu_tanh"},
        )
