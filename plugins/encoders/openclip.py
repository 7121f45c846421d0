"""Image towers of OpenCLIP (Cherti et al. 2022, arXiv 2212.07143; DataComp: Gadre et al. 2023, arXiv 2304.14108)."""

from __future__ import annotations

from typing import Literal

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

ARCHITECTURES = {
    "b32": "vit_base_patch32_clip_224",
    "b16": "vit_base_patch16_clip_224",
    "l14": "vit_large_patch14_clip_224",
    "h14": "vit_huge_patch14_clip_224",
    "g14": "vit_giant_patch14_clip_224",
    "bigg14": "vit_gigantic_patch14_clip_224",
}
SIZES = {"laion2b": tuple(ARCHITECTURES), "datacompxl": ("b32", "b16", "l14")}


@encoders.register("openclip")
class OpenCLIP(TimmEncoder):
    """OpenCLIP patch tokens of the last block, without the final norm (D = 768, 1024, 1280, 1408 or 1664).

    REPA and its successors do not use OpenCLIP; this follows REPA's use of OpenAI's CLIP (arXiv 2410.06940):

    - tokens: patch tokens of the last block; the class token is dropped. The final norm and projection were trained on
      the class token only, so neither is applied;
    - images: scaled to [0, 1], resized (bicubic) to one patch per token (L/14: 256 -> 224 for 16 x 16 tokens), then
      normalized with CLIP's mean and std, except LAION's L/14, which was trained with 0.5 for both;
    - activation: GELU, as OpenCLIP trains (for OpenAI's weights, use the encoder ``clip``);
    - position embedding: trained at 224 pixels, resampled to the denoiser's grid;
    - image embedding: the class token after the final norm, before the projection.

    Args:
        size: ViT-B/32, B/16, L/14, H/14, g/14 or bigG/14.
        data: training data: LAION-2B (all sizes) or DataComp-XL (b32, b16 and l14).
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or OpenCLIP's layout ("visual.*").
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["b32", "b16", "l14", "h14", "g14", "bigg14"] = "l14",
        data: Literal["laion2b", "datacompxl"] = "laion2b",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        if size not in SIZES[data]:
            raise ValueError(f"encoder openclip: data = '{data}' has sizes {', '.join(SIZES[data])}, not '{size}'")
        super().__init__(
            f"{ARCHITECTURES[size]}.{data}",
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=False,
            resize_first=True,
        )
