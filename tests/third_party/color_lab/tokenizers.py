"""Linear blocks as latents, with a file format of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from components.contracts import Posterior, Tokenizer
from components.files.adapter import Exported, State, StateDictAdapter, load_module
from components.files.model_file import save_tree
from components.files.weights_file import WeightsFile
from components.nn.precision import at_least_fp32
from components.registry import File, tokenizers


class Palette(StateDictAdapter):
    """A file with the two matrices ``palette.analysis`` (8, 48) and ``palette.synthesis`` (48, 4)."""

    name = "palette"
    summary = "the tokenizer, as a palette of Color Lab"
    exports = ("tokenizer",)
    requires = ("tokenizer",)

    def recognizes(self, file: WeightsFile, role: str) -> bool:
        """Whether the file holds a palette."""
        return "palette.analysis" in file.tensors

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Reshape the matrices to convolutions."""
        analysis, synthesis = (file.tensors[f"palette.{name}"] for name in ("analysis", "synthesis"))
        file.used |= {"palette.analysis", "palette.synthesis"}
        return {
            role: {
                "analysis.weight": analysis.unflatten(1, (3, 4, 4)),
                "synthesis.weight": synthesis.T.unflatten(1, (3, 4, 4)),
            }
        }

    def to_files(self, folder: Path, model: Exported) -> tuple[list[Path], str]:
        """Write ``NAME.palette`` with the step in its name."""
        state, path = model.states["tokenizer"], folder / f"{model.step}.palette"
        folder.mkdir(parents=True, exist_ok=True)
        analysis, synthesis = (state[f"{name}.weight"].flatten(1) for name in ("analysis", "synthesis"))
        save_tree(path, {"palette": {"analysis": analysis, "synthesis": synthesis.T}})
        return [path], f"Open {path} with Color Lab."


@tokenizers.register("color_blocks")
class ColorBlocks(Tokenizer):
    """Linear maps between blocks of 4 x 4 pixels and four channels.

    Args:
        weights: palette or titanrepa file of initial weights; none: random weights.
    """

    factor = 4
    channels = 4
    adapters = (Palette,)

    def __init__(self, *, weights: File | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.analysis = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.synthesis = nn.ConvTranspose2d(4, 3, 4, stride=4, bias=False)

    def init_weights(self) -> None:
        """Initialize with PyTorch's defaults."""
        self.analysis.reset_parameters()
        self.synthesis.reset_parameters()

    def load_weights(self) -> None:
        """Load ``weights``, if set. Raises WeightsError if the file is missing or does not fit."""
        if self.weights:
            load_module(self, self.weights, "tokenizer", "tokenizer color_blocks")

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, 4, R / 4, R / 4)."""
        mean, logvar = at_least_fp32(self.analysis(x)).chunk(2, dim=1)
        return Posterior(mean, torch.clamp(logvar, -30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 4 h, 4 w)."""
        return self.synthesis(z)

    def units(self) -> Sequence[nn.Module]:
        """Return both layers."""
        return [self.analysis, self.synthesis]
