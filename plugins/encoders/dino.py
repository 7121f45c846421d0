"""DINO (Caron et al. 2021, arXiv 2104.14294)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

ARCHITECTURES = {"s": "vit_small", "b": "vit_base"}
IMAGE_PATCH = 16  # pixels per token of the denoiser, whatever the transformer's patch


@encoders.register("dino")
class DINO(TimmEncoder):
    """DINO ViT-S or B patch tokens behind the final norm, with patches of 16 or 8 pixels (D = 384 or 768).

    As "dinov1" of REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), and "dino" of iREPA (arXiv 2512.10794):

    - tokens: the patch tokens of the last block after the final LayerNorm (``get_intermediate_layers`` in the authors'
      code, which their own evaluations read); the class token is dropped;
    - images: [0, 1], ImageNet's mean and deviation, then bicubic to 16 pixels per token: 256-pixel images with
      16 x 16 tokens stay as they are. Patches of 8 see the same image, and each token is the mean of 2 x 2 of theirs:
      at 8 pixels per token the image would lose half its resolution;
    - position embedding: the 14 x 14 (28 x 28) of the 224-pixel training, resampled to the transformer's grid;
    - one vector per image: the class token behind the final norm, on which DINO's nearest neighbours are defined.

    Args:
        size: ViT-S or B.
        patch: pixels per side of a patch.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's or the authors' layout (the backbone's file).
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "b"] = "b",
        patch: Literal[16, 8] = 16,
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            f"{ARCHITECTURES[size]}_patch{patch}_224.dino",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            image_size=grid * IMAGE_PATCH,
        )
