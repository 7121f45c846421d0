"""TensorBoard event files: scalars with descriptions, images, histograms, and hyperparameters."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.run.monitor.tags import describe

BINS = [1e-12 * 1.1**k for k in range(774)]  # edges of a histogram's positive bins up to 1e20, as SummaryWriter's
_number = itertools.count()  # of the files of this process


class EventWriter:
    """Writer of one event file.

    Writes in the calling thread: TensorBoard's own writer has a thread that dies at the first error, as on a full disk,
    after which it hangs at the next flush. After an error a new file is begun, since the last record may be incomplete.

    Args:
        folder: to write to.
        purge_step: TensorBoard hides points of earlier files at this step and later; None: hides nothing.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder, self._purge_step = folder, purge_step
        self._records: Any = None
        self._described: set[str] = set()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point; the first point of each tag in a file carries the tag's description."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata

        metadata = None
        if tag not in self._described:
            plugin = SummaryMetadata.PluginData(plugin_name="scalars")
            # TensorBoard's fast loader drops the description if data_class is not set.
            metadata = SummaryMetadata(
                plugin_data=plugin, summary_description=describe(tag) or "", data_class=DATA_CLASS_SCALAR
            )
        point = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
        self._add(Summary(value=[point]), step)
        self._described.add(tag)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point of several curves, and flush the file."""
        for tag, value in values.items():
            self.scalar(tag, value, step)
        self.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Write Markdown text."""
        from torch.utils.tensorboard import summary

        self._add(summary.text(tag, text), step)

    def picture(self, tag: str, picture: Tensor, step: int) -> None:
        """Write an image (3, H, W) in [0, 1]."""
        from torch.utils.tensorboard import summary

        self._add(summary.image(tag, picture, dataformats="CHW"), step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Write a histogram of values of any shape."""
        from torch.utils.tensorboard import summary

        self._add(summary.histogram(tag, values.float().cpu(), [*(-b for b in reversed(BINS)), 0.0, *BINS]), step)

    def hyperparameters(self, values: Mapping[str, Any], metrics: list[str]) -> None:
        """Write a row of the HPARAMS tab, which shows the values and the last point of each metric.

        Args:
            values: by name; other types than numbers and text are converted to text.
            metrics: tags of scalars in this folder.
        """
        from torch.utils.tensorboard import summary

        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        shown = {k: numbers.get(k, str(v)) for k, v in values.items()}
        # SummaryWriter.add_hparams would write to a separate folder, which TensorBoard shows as a second run.
        for part in summary.hparams(shown, dict.fromkeys(metrics, 0.0)):
            self._add(part)
        self.flush()

    def flush(self) -> None:
        """Write everything to the file.

        Raises:
            OSError: it cannot be written.
        """
        if self._records is not None:
            self._guarded(self._records.flush)

    def close(self) -> None:
        """Flush and close the file."""
        if self._records is not None:
            self._guarded(self._records.close)
            self._records = None

    def _add(self, summary: Any, step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._records is None:
            self._open()
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _open(self) -> None:
        """Begin a file as TensorBoard's own writer does."""
        # Imported here because it is slow, and only rank 0 needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._records = RecordWriter(open(self.folder / name, "wb"))  # noqa: SIM115, open until close()
        self._described.clear()
        now = {"wall_time": time.time(), "step": self._purge_step}
        self._write(Event(**now, file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._write(Event(**now, session_log=SessionLog(status=SessionLog.START)))
            self._purge_step = None  # a later file must not hide points of this one

    def _write(self, event: Any) -> None:
        self._guarded(lambda: self._records.write(event.SerializeToString()))

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception:
            self._records = None
            raise
