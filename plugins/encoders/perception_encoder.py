"""Perception Encoder (Bolya et al. 2025, arXiv 2504.13181)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from components.nn.timm_encoder import TimmEncoder
from components.registry import encoders

MODELS = {
    "core": {
        "t": "vit_pe_core_tiny_patch16_384.fb",
        "s": "vit_pe_core_small_patch16_384.fb",
        "b": "vit_pe_core_base_patch16_224.fb",
        "l": "vit_pe_core_large_patch14_336.fb",
        "g": "vit_pe_core_gigantic_patch14_448.fb",
    },
    "spatial": {
        "t": "vit_pe_spatial_tiny_patch16_512.fb",
        "s": "vit_pe_spatial_small_patch16_512.fb",
        "b": "vit_pe_spatial_base_patch16_512.fb",
        "l": "vit_pe_spatial_large_patch14_448.fb",
        "g": "vit_pe_spatial_gigantic_patch14_448.fb",
    },
    "lang": {"l": "vit_pe_lang_large_patch14_448.fb", "g": "vit_pe_lang_gigantic_patch14_448.fb"},
}


@encoders.register("perception_encoder")
class PerceptionEncoder(TimmEncoder):
    """Perception Encoder (PE) patch tokens, without the final norm (D = 192, 384, 768, 1024 or 1536).

    As in iREPA (arXiv 2512.10794); REPA and REPA-E predate it:

    - tokens: the patch tokens as they leave the last block; "spatial" and "lang" have no final norm, and iREPA leaves
      out the one of "core". The class token, where there is one, is dropped. PE's best features for a task may lie in
      an inner block of "core", which is the paper's finding: ``layer`` takes it;
    - images: [0, 1], bilinear without antialiasing to one patch per token (L and G: 256 -> 224 for 16 x 16 tokens;
      T, S and B stay at 256), then mean and deviation 0.5; bilinear is what PE was trained with;
    - position: rotary, by the row and column of the denoiser's grid (timm stretches them to the training's grid), and
      an absolute embedding of the training's grid, resampled to the denoiser's: bilinear without antialiasing. Both
      as in the authors' code;
    - one vector per image: "core": that of its attention pool; else the mean of the patch tokens.

    Args:
        variant: "core" (contrastive), "spatial" (tuned for dense features) or "lang" (for language models; L and G).
        size: T/16, S/16, B/16, L/14 or G/14.
        layer: block whose tokens are taken; negative ones count from the last.
        norm: apply the final norm of "core", too.
        pretrained: read the published weights from the Hugging Face cache, or download them; false: random.
        checkpoint: file of weights to read instead, in timm's or the authors' layout.
    """

    position_resize = {"interpolation": "bilinear", "antialias": False}

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        variant: Literal["core", "spatial", "lang"] = "spatial",
        size: Literal["t", "s", "b", "l", "g"] = "b",
        layer: int = -1,
        norm: bool = False,
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        sizes = MODELS[variant]
        if size not in sizes:
            raise ValueError(
                f"encoder perception_encoder: variant = '{variant}' has sizes {', '.join(sizes)}, not '{size}'"
            )
        super().__init__(
            sizes[size],
            grid,
            pretrained=pretrained,
            checkpoint=checkpoint,
            final_norm=norm,
            resize_first=True,
            resize="bilinear",
            layer=layer,
            # timm would stretch the rotary positions to the grid of the training.
            options={"ref_feat_shape": (grid, grid)},
        )

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # timm's conversion of the authors' keys leaves the position embedding as it is; on its own keys it resamples.
        return super()._converted(super()._converted(state))
