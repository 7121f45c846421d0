"""DINOv3 (Simeoni et al. 2025, arXiv 2508.10104)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {
    "s": "vit_small_patch16_dinov3_qkvb",
    "s+": "vit_small_plus_patch16_dinov3_qkvb",
    "b": "vit_base_patch16_dinov3_qkvb",
    "l": "vit_large_patch16_dinov3_qkvb",
    "h+": "vit_huge_plus_patch16_dinov3_qkvb",
    "7b": "vit_7b_patch16_dinov3",  # trained without query, key and value biases
}
SATELLITE = ("l", "7b")


@encoders.register("dinov3")
class DINOv3(TimmEncoder):
    """DINOv3 ViT/16 patch tokens after the final norm (D = 384, 384, 768, 1024, 1280 or 4096).

    Follows iREPA (arXiv 2512.10794); DINOv3 is newer than REPA and REPA-E:

    - tokens: patch tokens of the last block after the final LayerNorm (``x_norm_patchtokens`` in the authors' code);
      the class token and the four register tokens are dropped;
    - images: scaled to [0, 1], resized (bilinear, antialiased) to 16 pixels per token as in the authors' transform,
      then normalized with the mean and std of ImageNet or of the satellite data; 256-pixel images with 16 x 16 tokens
      are not resized;
    - positions: rotary, computed for the denoiser's grid without resampling;
    - query and value biases: kept as in the authors' files (timm's "qkvb" variants; timm's other variants drop biases
      that are zero);
    - image embedding: the class token after the final norm.

    The authors' repositories require accepting a license; timm's copies are distributed under the same license.

    Args:
        size: ViT-S, S+, B, L, H+ or 7B.
        data: training data: web images (lvd1689m) or satellite images (sat493m; sizes l and 7b only).
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or the authors' layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "s+", "b", "l", "h+", "7b"] = "b",
        data: Literal["lvd1689m", "sat493m"] = "lvd1689m",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        if data == "sat493m" and size not in SATELLITE:
            raise ValueError(f"encoder dinov3: data = '{data}' has sizes {', '.join(SATELLITE)}, not '{size}'")
        super().__init__(
            f"{MODELS[size]}.{data}",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            resize_first=True,
            resize="bilinear_antialias",
            options={"global_pool": "token"},
        )
