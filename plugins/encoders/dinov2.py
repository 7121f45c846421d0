"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), with or without registers (Darcet et al. 2023, arXiv 2309.16588)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

ARCHITECTURES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant"}


@encoders.register("dinov2")
class DINOv2(TimmEncoder):
    """DINOv2 ViT/14 patch tokens behind the final norm: the alignment target of the published REPA-E runs.

    As in REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483):

    - tokens: the patch tokens of the last block after the final LayerNorm (``x_norm_patchtokens`` in the authors'
      code), which is where DINOv2's own dense tasks read them; class and register tokens are dropped;
    - images: [0, 1], ImageNet's mean and deviation, then bicubic to 14 pixels per token (256 -> 224 for 16 x 16
      tokens, 512 -> 448 for 32 x 32);
    - position embedding: the 37 x 37 of the 518-pixel training, resampled to the denoiser's grid.

    D is 384, 768, 1024 or 1536 for sizes s, b, l and g.

    Args:
        size: ViT-S, B, L or g.
        registers: the variant with four register tokens.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's or the authors' layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "b", "l", "g"] = "b",
        registers: bool = False,
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        variant = "_reg4" if registers else ""
        super().__init__(
            f"{ARCHITECTURES[size]}_patch14{variant}_dinov2.lvd142m",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
        )
