"""TensorBoard event files: scalars with descriptions, images, histograms, and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.run.monitor.tags import describe


class EventWriter:
    """Writer of one event file.

    Args:
        folder: to write to.
        purge_step: TensorBoard hides points of earlier files at this step and later; None: hides nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        # Imported here because it is slow, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=purge_step)
        self._described: set[str] = set()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point; the first point of each tag in a file carries the tag's description."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

        metadata = None
        if tag not in self._described:
            self._described.add(tag)
            plugin = SummaryMetadata.PluginData(plugin_name="scalars")
            # TensorBoard's fast loader drops the description if data_class is not set.
            metadata = SummaryMetadata(
                plugin_data=plugin, summary_description=describe(tag) or "", data_class=DATA_CLASS_SCALAR
            )
        point = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
        self._writer.file_writer.add_summary(Summary(value=[point]), step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point of several curves, and flush the file."""
        for tag, value in values.items():
            self.scalar(tag, value, step)
        self._writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Write Markdown text."""
        self._writer.add_text(tag, text, step)

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """Write an image (3, H, W) in [0, 1]."""
        self._writer.add_image(tag, picture, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Write a histogram of values of any shape."""
        self._writer.add_histogram(tag, values.float().cpu(), step)

    def hyperparameters(self, values: Mapping[str, Any], metrics: list[str]) -> None:
        """Write a row of the HPARAMS tab, which shows the values and the last point of each metric.

        Args:
            values: by name; other types than numbers and text are converted to text.
            metrics: tags of scalars in this folder.
        """
        from torch.utils.tensorboard.summary import hparams

        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        shown = {k: numbers.get(k, str(v)) for k, v in values.items()}
        # SummaryWriter.add_hparams would write to a separate folder, which TensorBoard shows as a second run.
        for summary in hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
