"""The encoder of masked autoencoders (He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {"b": "vit_base_patch16_224.mae", "l": "vit_large_patch16_224.mae", "h": "vit_huge_patch14_224.mae"}
DECODER = ("decoder_", "mask_token")


@encoders.register("mae")
class MAE(TimmEncoder):
    """MAE ViT patch tokens of the last block, without the final norm (D = 768, 1024 or 1280).

    As in REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which take ViT-L:

    - tokens: the patch tokens as they leave the last block; nothing is masked. REPA's code stops before the final
      norm; the class token is dropped;
    - images: [0, 1], ImageNet's mean and deviation, then bicubic to one patch per token: B and L stay at 256 pixels
      for 16 x 16 tokens, H/14 sees 224;
    - position embedding: the file's sines and cosines of the 14 x 14 (H: 16 x 16) grid, resampled to the denoiser's;
    - one vector per image: the class token behind the final norm, as MAE's linear probes read it.

    Args:
        size: ViT-B/16, L/16 or H/14.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's or the authors' layout ("model"), with or without the
            decoder, which is left out.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b", "l", "h"] = "l",
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(MODELS[size], grid, pretrained=pretrained, checkpoint=checkpoint, final_norm=False)

    def _read(self, path: str | Path) -> dict[str, Tensor]:
        return {key: value for key, value in super()._read(path).items() if not key.startswith(DECODER)}
