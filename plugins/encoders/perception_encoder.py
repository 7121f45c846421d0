"""Perception Encoder (Bolya et al. 2025, arXiv 2504.13181)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

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

    Follows iREPA (arXiv 2512.10794); the Perception Encoder is newer than REPA and REPA-E:

    - tokens: patch tokens of the last block; the class token, if any, is dropped. "spatial" and "lang" have no final
      norm, and iREPA does not apply that of "core". The paper finds that the best features of "core" for a task may be
      in an intermediate block, which ``layer`` selects;
    - images: scaled to [0, 1], resized (bilinear, not antialiased, as PE was trained) to one patch per token (L and G:
      256 -> 224 for 16 x 16 tokens; T, S and B stay at 256), then normalized with mean and std 0.5;
    - positions, as in the authors' code: rotary, from row and column in the denoiser's grid (timm scales them to the
      training grid), plus an absolute embedding of the training grid, resampled to the denoiser's (bilinear, not
      antialiased);
    - image embedding: the output of the attention pool for "core", the mean of the patch tokens for the others.

    Args:
        variant: "core" (contrastive), "spatial" (tuned for dense features) or "lang" (for language models; L and G).
        size: T/16, S/16, B/16, L/14 or G/14.
        layer: block whose output tokens are used, counted from 0; negative values count from the end.
        norm: apply the final norm of "core".
        pretrained: load published weights from the Hugging Face cache, downloading if needed; false: random weights.
        checkpoint: weights file to load instead, in timm's or the authors' layout.
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
        checkpoint: File | None = None,
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
            # Without this, timm scales the rotary positions to the training grid.
            options={"ref_feat_shape": (grid, grid)},
        )

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # Twice: timm's first pass renames the authors' keys, and only a pass on timm's keys resamples the positions.
        return super()._converted(super()._converted(state))
