"""DINO (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

ARCHITECTURES = {"s": "vit_small", "b": "vit_base"}
IMAGE_PATCH = 16  # pixels per denoiser token, for both patch sizes


@encoders.register("dino")
class DINO(TimmEncoder):
    """DINO ViT-S or B patch tokens after the final norm, with a patch size of 16 or 8 pixels (D = 384 or 768).

    Follows "dinov1" in REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), and "dino" in iREPA (arXiv 2512.10794):

    - tokens: patch tokens of the last block after the final LayerNorm, as the authors' evaluations use them
      (``get_intermediate_layers`` in their code); the class token is dropped;
    - images: scaled to [0, 1], normalized with ImageNet's mean and std, resized (bicubic) to 16 pixels per token;
      256-pixel images with 16 x 16 tokens are not resized. Patch size 8 uses the same image size and averages 2 x 2
      tokens into one, because 8 pixels per token would halve the image's resolution;
    - position embedding: trained at 224 pixels on a 14 x 14 grid (patch size 8: 28 x 28), resampled to the model's
      grid;
    - image embedding: the class token after the final norm, which DINO's k-NN evaluation uses.

    Args:
        size: ViT-S or B.
        patch: patch size in pixels.
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or the authors' layout (their backbone-only file).
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "b"] = "b",
        patch: Literal[16, 8] = 16,
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        super().__init__(
            f"{ARCHITECTURES[size]}_patch{patch}_224.dino",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            image_size=grid * IMAGE_PATCH,
        )
