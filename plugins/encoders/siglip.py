"""Image tower of SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {
    "b": "vit_base_patch16_siglip_256.webli",
    "l": "vit_large_patch16_siglip_256.webli",
    "so400m": "vit_so400m_patch14_siglip_224.webli",
}


@encoders.register("siglip")
class SigLIP(TimmEncoder):
    """SigLIP patch tokens after the final norm (D = 768, 1024 or 1152).

    Follows iREPA (arXiv 2512.10794), except for the image normalization; REPA and REPA-E do not use SigLIP:

    - tokens: all tokens of the last block after the final norm, the input of SigLIP's attention pool; SigLIP has no
      class token;
    - images: scaled to [0, 1], normalized with mean and std 0.5 as SigLIP was trained (iREPA's code uses ImageNet's),
      resized (bicubic) to one patch per token; for 256-pixel images and 16 x 16 tokens, B and L take 256 pixels and
      so400m takes 224;
    - activation: tanh-approximated GELU, as in the authors' code (timm's default is exact GELU);
    - position embedding: trained on a 16 x 16 grid, resampled if the denoiser's grid differs;
    - image embedding: the output of the attention pool.

    Args:
        size: ViT-B/16, L/16 or So400m/14.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's layout or OpenCLIP's for timm models ("visual.trunk.*").
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "so400m"] = "b",
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
