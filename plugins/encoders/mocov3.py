"""MoCo v3 (Chen et al. 2021, arXiv 2104.02057)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {"s": "vit_small_patch16_224", "b": "vit_base_patch16_224", "l": "vit_large_patch16_224"}
HEADS = 12  # of MoCo v3's ViT-S; the standard ViT-S has 6
URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-{size}-300ep/vit-{size}-300ep.pth.tar"
URLS = {
    "s": URL.format(size="s"),
    "b": URL.format(size="b"),
    "l": "https://drive.google.com/file/d/1Foa2-FqhwIFYjcAAbY9sXyO-1Vwwx-_9 (of https://github.com/LTH14/rcg)",
}
# Four modules of the published ViT-L file are misnamed: the block's number (13 or 14) replaced their own.
SLIPS = {
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}
PROJECTOR = ("head.", "fc.")


@encoders.register("mocov3")
class MoCoV3(TimmEncoder):
    """MoCo v3 ViT/16 patch tokens after the final norm (D = 384, 768 or 1024).

    Follows REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which use ViT-B and L:

    - tokens: patch tokens of the last block after the final LayerNorm; the class token is dropped;
    - images: scaled to [0, 1], normalized with ImageNet's mean and std, resized (bicubic) to 16 pixels per token;
      256-pixel images with 16 x 16 tokens are not resized;
    - position embedding: sine-cosine, stored in the file for a 14 x 14 grid; as in REPA, resampled to the denoiser's
      grid instead of recomputed for it;
    - image embedding: the class token after the final norm, as in the authors' linear probes.

    timm has no copy of the weights, so ``checkpoint`` must name the published file: S and B by the authors, L by RCG
    (Li et al. 2023, arXiv 2312.03701), whose misnamed modules are renamed on loading.

    Args:
        size: ViT-S (with 12 heads), B or L.
        branch: network to load from the published file: the trained encoder, as in REPA, or its moving average.
        pretrained: load published weights; false: random weights, unless there is a checkpoint.
        checkpoint: the published file ("state_dict" with "module.base_encoder.*"), or one in timm's or DeiT's layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["s", "b", "l"] = "b",
        branch: Literal["base", "momentum"] = "base",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        options: dict[str, Any] = {"pretrained_cfg": published(URLS[size])}
        if size == "s":
            options["num_heads"] = HEADS
        super().__init__(MODELS[size], grid, pretrained=pretrained, checkpoint=checkpoint, options=options)
        self.branch = branch

    def _read(self, path: str | Path) -> dict[str, Tensor]:
        state = super()._read(path)
        prefix = f"module.{self.branch}_encoder."
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return {mended(key): value for key, value in state.items() if not key.startswith(PROJECTOR)}


def published(url: str) -> dict[str, Any]:
    """timm ``pretrained_cfg`` for weights that timm does not distribute: their URL, with ImageNet's mean and std."""
    return {
        "url": url,
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
        "first_conv": "patch_embed.proj",
        "num_classes": 0,
    }


def mended(key: str) -> str:
    """Correct a misnamed key of the published ViT-L; return any other key unchanged."""
    for slip, meant in SLIPS.items():
        if key.startswith(slip):
            return meant + key.removeprefix(slip)
    return key
