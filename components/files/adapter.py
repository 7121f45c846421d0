"""State-dict adapters: the file formats of other programs that a plugin's weights can be read from and written to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from components.files import weights_file
from components.files.weights import WeightsError, load_strict
from components.files.weights_file import WeightsFile

State = dict[str, Tensor]


@dataclass
class Exported:
    """A model to write.

    Attributes:
        modules: the run's :class:`components.contracts.Modules`, on the meta device; those not exported may be None.
        states: state dicts by field of ``modules``, averaged where an average exists unless raw weights were requested.
        online: raw weights by field; None: the source has only ``states``.
        weights: "ema" or "online", the kind of ``states``.
        step: optimizer steps of training.
        resolution: image side in pixels.
        source: path of the model in messages.
        name: file name that the user chose, or "".
    """

    modules: Any
    states: dict[str, State]
    online: dict[str, State] | None
    weights: str
    step: int
    resolution: int
    source: str
    name: str = ""


class StateDictAdapter:
    """One file format of a tokenizer, denoiser or discriminator; the base class is the format of the plugin's own keys.

    A plugin class lists its adapters in ``adapters``: the commands ``import`` and ``export`` ask them. An adapter is
    constructed with the plugin, which may be on the meta device.

    Roles: "tokenizer", "discriminator", and for a denoiser "ema" (averaged weights) or "model" (raw weights).

    Attributes:
        name: of the format, as in ``export --format=NAME``.
        summary: what ``export`` writes, in a few words.
        exports: fields of ``Modules`` whose weights :meth:`to_files` takes; empty: the format can only be read.
        requires: those of ``exports`` without which there is nothing to write.
        training_checkpoint: whether the format holds both averaged and raw weights, in files that the user can name.
        arguments: config keys of the settings that files of this format state under ``args``.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    exports: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    training_checkpoint: ClassVar[bool] = False
    arguments: ClassVar[Mapping[str, str]] = {}

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def keys(self) -> Collection[str]:
        """Keys of the module in this format, without a prefix."""
        return self.plugin.state_dict().keys()

    def recognizes(self, file: WeightsFile, role: str) -> bool:
        """Whether a file holds the module in this format."""
        return weights_file.holds(file, role, self.keys())

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take the module's weights from a file; a file may hold parts of the model beside it, such as heads.

        Args:
            file: content of the file; its ``used`` is updated.
            role: see the class.
            what: owner of the weights in messages.

        Returns:
            State dicts by field of ``Modules``.

        Raises:
            WeightsError: the file states that it is of another architecture.
        """
        part = "denoiser" if role in ("ema", "model") else role
        return {part: weights_file.take(file, role, self.keys())[1]}

    def to_foreign(self, state: State) -> State:
        """Convert the module's state dict to this format's keys, for a file of the whole model."""
        return state

    def to_files(self, folder: Path, model: Exported) -> tuple[list[Path], str]:
        """Write a model to a folder, which is created if missing; return the files and how to use them."""
        raise NotImplementedError

    @classmethod
    def num_classes(cls, file: WeightsFile, label_dropout: float) -> int:
        """Number of classes of a denoiser in a file, or 0 if it does not show.

        Args:
            file: content of the file.
            label_dropout: if positive, the last label is the unconditional class.
        """
        return 0


def recognized(plugin: Any, file: WeightsFile, role: str) -> StateDictAdapter | None:
    """Return the adapter of the format that a file holds the plugin in, or None if it does not hold it."""
    found = (make(plugin) for make in (*plugin.adapters, StateDictAdapter))
    return next((adapter for adapter in found if adapter.recognizes(file, role)), None)


def named(plugin: Any, name: str) -> StateDictAdapter:
    """Return the plugin's adapter of a format, or that of its own keys if it declares none of this name."""
    return next((make for make in plugin.adapters if make.name == name), StateDictAdapter)(plugin)


def take_module(plugin: Any, file: WeightsFile, role: str, what: str) -> dict[str, State]:
    """Take a plugin's weights from a file in any of its formats, as :meth:`StateDictAdapter.from_file`.

    Raises:
        WeightsError: the file is of another architecture, or a folder of another program in no format of the plugin.
    """
    adapter = recognized(plugin, file, role)
    if adapter is None and file.config is not None:
        formats = ", ".join(make.name for make in plugin.adapters) or "none but its own"
        raise WeightsError(
            f"{what}: '{file.source}' is a folder with a config.json of another format; expected one of those that "
            f"{type(plugin).__name__} reads: {formats}"
        )
    # Of a file that does not hold the module, all tensors are taken, so that a strict load lists them.
    return (adapter or StateDictAdapter(plugin)).from_file(file, role, what)


def load_module(plugin: Any, path: str, role: str, what: str) -> None:
    """Load a plugin's weights in place from a file in any of its formats; logs what else the file contains.

    Raises:
        WeightsError: the file is missing, unreadable, or does not fit; every misfitting key is listed.
    """
    file = weights_file.read(path, what, part=role)
    load_strict(plugin, take_module(plugin, file, role, what)[role], what, path)
    weights_file.note_left_out(file, what)
