"""TensorBoard's event file: scalars with descriptions, pictures, histograms, and the hyperparameters at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.run.monitor.tags import describe


class EventWriter:
    """One event file.

    Args:
        folder: of the file.
        purge_step: TensorBoard hides what earlier files hold of this step and later ones; None: nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Slow to import, and no other rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=purge_step)
        self._described: set[str] = set()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve; a file's first of each tag carries the description."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

        metadata = None
        if tag not in self._described:
            self._described.add(tag)
            plugin = SummaryMetadata.PluginData(plugin_name="scalars")
            # Without its data class TensorBoard's fast loader drops the description.
            metadata = SummaryMetadata(
                plugin_data=plugin, summary_description=describe(tag) or "", data_class=DATA_CLASS_SCALAR
            )
        point = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
        self._writer.file_writer.add_summary(Summary(value=[point]), step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of several curves, on the disk at once."""
        for tag, value in values.items():
            self.scalar(tag, value, step)
        self._writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._writer.add_text(tag, text, step)

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """(3, H, W) in [0, 1]."""
        self._writer.add_image(tag, picture, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Of values of any shape."""
        self._writer.add_histogram(tag, values.float().cpu(), step)

    def hyperparameters(self, values: Mapping[str, Any], metrics: list[str]) -> None:
        """A row of the HPARAMS tab: the values, and the last point of each metric.

        Args:
            values: by name; what is neither a number nor text is shown as text.
            metrics: tags of scalars in this folder.
        """
        from torch.utils.tensorboard.summary import hparams

        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        shown = {k: numbers.get(k, str(v)) for k, v in values.items()}
        # SummaryWriter.add_hparams would write them to a folder of their own, which looks like a second run.
        for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
