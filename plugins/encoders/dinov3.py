"""DINOv3 (Simeoni et al. 2025, arXiv 2508.10104)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {
    "s": "vit_small_patch16_dinov3_qkvb",
    "s+": "vit_small_plus_patch16_dinov3_qkvb",
    "b": "vit_base_patch16_dinov3_qkvb",
    "l": "vit_large_patch16_dinov3_qkvb",
    "h+": "vit_huge_plus_patch16_dinov3_qkvb",
    "7b": "vit_7b_patch16_dinov3",  # made without biases of queries, keys and values
}
SATELLITE = ("l", "7b")


@encoders.register("dinov3")
class DINOv3(TimmEncoder):
    """DINOv3 ViT/16 patch tokens behind the final norm (D = 384, 384, 768, 1024, 1280 or 4096).

    As in iREPA (arXiv 2512.10794); REPA and REPA-E predate it:

    - tokens: the patch tokens of the last block after the final LayerNorm (``x_norm_patchtokens`` in the authors'
      code); the class token and the four register tokens are dropped;
    - images: [0, 1], bilinear with antialiasing to 16 pixels per token (the authors' transform; 256-pixel images with
      16 x 16 tokens stay as they are), then ImageNet's mean and deviation, or those of the satellite images;
    - position: rotary, computed for the denoiser's grid; nothing is resampled;
    - biases of queries and values are kept, as the authors' files have them (timm's "qkvb" variants; those without
      drop them where they are zero);
    - one vector per image: the class token behind the final norm.

    The authors' repositories want their licence accepted; timm's copies are under the same licence.

    Args:
        size: ViT-S, S+, B, L, H+ or 7B.
        data: what it was trained on: web images, or satellite images (sizes l and 7b).
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's or the authors' layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "s+", "b", "l", "h+", "7b"] = "b",
        data: Literal["lvd1689m", "sat493m"] = "lvd1689m",
        pretrained: bool = True,
        checkpoint: str | None = None,
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
