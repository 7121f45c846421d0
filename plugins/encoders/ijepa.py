"""I-JEPA (Assran et al. 2023, arXiv 2301.08243)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from components.files.weights import WeightsError, read_state, read_tree
from components.nn.timm_encoder import TimmEncoder
from components.registry import File, encoders

MODELS = {
    "h14": "vit_huge_patch14_gap_224.in1k_ijepa",
    "h16_448": "vit_huge_patch16_gap_448.in1k_ijepa",
    "g16": "vit_giant_patch16_gap_224.in22k_ijepa",
}
PREFIX = "module."  # added by DistributedDataParallel
BRANCHES = ("encoder", "target_encoder")


@encoders.register("ijepa")
class IJEPA(TimmEncoder):
    """I-JEPA patch tokens after the final norm (D = 1280; size g: 1408).

    Follows the encoder ablations of REPA (arXiv 2410.06940) and REPA-E (arXiv 2504.10483), which use ViT-H/14 trained
    on ImageNet-1K:

    - tokens: all tokens of the last block after the final norm, without masking; I-JEPA has no class token;
    - images: scaled to [0, 1], normalized with ImageNet's mean and std, resized (bicubic) to one patch per token
      (H/14: 256 -> 224 for 16 x 16 tokens, 512 -> 448 for 32 x 32);
    - position embedding: sine-cosine, stored in the file for its training grid (H/14: 16 x 16), resampled if the
      denoiser's grid differs. The authors' code resamples as if the first position belonged to a class token; this
      plugin does not;
    - image embedding: the mean of the tokens, as in the authors' linear probes.

    timm has no copy of the weights, so ``checkpoint`` must name the authors' file.

    Args:
        size: ViT-H/14, H/16 at 448 pixels, or g/16 (trained on ImageNet-22K).
        branch: network to load from the authors' file: the context encoder, as in REPA, or the target encoder, its
            moving average, which the authors evaluate.
        pretrained: load published weights; false: random weights, unless there is a checkpoint.
        checkpoint: the authors' file ("encoder" and "target_encoder", each with "module.*"), or one in timm's layout.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        *,
        size: Literal["h14", "h16_448", "g16"] = "h14",
        branch: Literal["encoder", "target_encoder"] = "encoder",
        pretrained: bool = True,
        checkpoint: File | None = None,
    ) -> None:
        super().__init__(MODELS[size], grid, pretrained=pretrained, checkpoint=checkpoint)
        self.branch = branch

    def _read(self, path: str | Path) -> dict[str, Tensor]:
        tree = read_tree(path, self._what)
        held = [name for name in BRANCHES if isinstance(tree.get(name), dict)]
        if not held:
            return read_state(path, self._what)
        if self.branch not in held:
            raise WeightsError(
                f"{self._what}: checkpoint '{path}' holds {', '.join(map(repr, tree))}, but no '{self.branch}'; "
                f'set branch = "{held[0]}"'
            )
        return {key.removeprefix(PREFIX): value for key, value in tree[self.branch].items()}
