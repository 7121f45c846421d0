"""Checkpoints that are complete or absent, on torch.distributed.checkpoint (DCP).

A checkpoint is a folder ``step_00000100`` with the tensors (DCP's files: every rank writes its shards, any number
of ranks reads them), ``meta.json`` (the tree of the state and its plain Python values) and ``manifest.json`` (size
and CRC-32 of every file). It is written as ``step_00000100.partial`` and renamed when everything is on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from components import manifest, state_tree

META = "meta.json"
PARTIAL, REPLACED, REMOVING = ".partial", ".replaced", ".removing"

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written, is damaged or absent, or does not fit what it is loaded into."""


class CheckpointManager:
    """The checkpoints of one run, in one folder. With a process group, every method is called by all of its ranks.

    Args:
        folder: where the checkpoints lie, shared by all ranks; made by the first save.
        keep: how many of the newest stay after a save; 0 keeps all.
        group: the ranks that save and load together; None is the default group, or this process alone.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3, group: dist.ProcessGroup | None = None) -> None:
        if keep < 0:
            raise ValueError(f"keep must be 0 (all) or a number of checkpoints, not {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.group = group
        self._sound: set[Path] = set()  # what this process has verified or written

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes ``state`` as the checkpoint of ``step``, then removes those beyond ``keep``.

        Args:
            step: optimizer steps taken; an existing checkpoint of that step is replaced.
            state: nested dicts, lists and tuples of tensors (DTensors too) and plain values (None, bool, int,
                float, str), or objects with ``state_dict`` and ``load_state_dict``. The same keys on every rank;
                of plain values rank 0's are kept.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are whole.
            TypeError: the state holds a value of another type.
        """
        ranks = _Ranks(self.group)
        final = self.folder / _name(step)
        partial = final.with_name(final.name + PARTIAL)
        meta, tensors = state_tree.encode(_state_dicts(state))
        try:
            ranks.first(lambda: self._begin(partial))
            _dcp(dcp.save, tensors, ranks, storage_writer=_Writer(partial))
            ranks.first(lambda: (partial / META).write_text(json.dumps(meta)))
            files = _checksums(partial, ranks.first(lambda: sorted(os.listdir(partial))), ranks, sync=True)
            ranks.first(lambda: self._commit(step, partial, final, files))
        except (Exception, CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. Nothing of it "
                "was kept; earlier checkpoints are untouched. Make room, or choose a folder that can be written."
            ) from error
        self._sound.add(final)
        ranks.first(lambda: self._retire(final))
        return final

    def latest(self) -> Path | None:
        """The newest sound checkpoint, or None; see :meth:`candidates`."""
        return next(self.candidates(), None)

    def candidates(self) -> Iterator[Path]:
        """Sound checkpoints, newest first, each read through and compared with its manifest when its turn comes.

        A damaged or unfinished one is skipped with a warning that names the file and what is wrong with it.
        """
        ranks = _Ranks(self.group)
        for path in ranks.first(lambda: [p for _, p in self._list()]):
            problem = self._verify(path, ranks)
            if problem is None:
                yield path
            elif ranks.rank == 0:
                logger.warning("checkpoint %s is skipped: %s", path, problem)

    def load(self, step_or_path: int | str | Path, template: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a checkpoint into ``template``: tensors in place, plain values into the returned state.

        A top-level key that the template lacks is not read; below that level the template must match exactly.

        Args:
            step_or_path: a step of this folder, or the path of any checkpoint.
            template: as given to :meth:`save`, with tensors of the same shapes and dtypes (any sharding).

        Returns:
            The state: the template's own tensors, the checkpoint's plain values. Objects with ``load_state_dict``
            have received theirs.

        Raises:
            CheckpointError: no such checkpoint; damaged; keys, shapes or dtypes do not match (the first eight of
                each kind are named).
        """
        ranks = _Ranks(self.group)
        path = self.folder / _name(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)
        problem = self._verify(path, ranks)
        if problem is not None:
            there = ranks.first(lambda: ", ".join(p.name for _, p in self._list())) or "none"
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem} (in {self.folder}: {there})")
        meta, written = ranks.first(lambda: (json.loads((path / META).read_text()), manifest.read(path)["torch"]))
        state, tensors, problems = state_tree.match(_state_dicts(template), meta)
        if problems:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run:\n"
                + "\n".join(
                    f"  {len(keys)} {title}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
                    for title, keys in problems.items()
                )
                + "\nResume with the configuration that wrote it, or start a new run in another folder."
            )
        if tensors:
            try:
                _dcp(dcp.load, tensors, ranks, storage_reader=dcp.FileSystemReader(path))
            except (Exception, CheckpointException) as error:
                raise CheckpointError(
                    f"checkpoint {path}, written by torch {written}, cannot be read by torch {torch.__version__}: "
                    f"{_reason(error)}. A checkpoint needs the version of torch that wrote it, or a newer one."
                ) from error
        for key, value in template.items():
            if isinstance(value, Stateful):
                value.load_state_dict(state[key])
        return state

    def _list(self) -> list[tuple[int, Path]]:
        """(step, path) of whatever bears a checkpoint's name, newest first."""
        try:
            names = set(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoint folder {self.folder} cannot be read: {error.strerror}") from error
        found = []
        for name in names:
            match = re.fullmatch(rf"(step_(\d{{8,}}))({re.escape(REPLACED)})?", name)
            # A replaced one counts where a kill came between moving it away and putting the new one in place.
            if match and not (match[3] and match[1] in names):
                found.append((int(match[2]), self.folder / name))
        return sorted(found, reverse=True)

    def _verify(self, path: Path, ranks: _Ranks) -> str | None:
        """What is wrong with a checkpoint, or None; the same answer on every rank."""
        if path in self._sound:
            # Retention or a user may have removed it since.
            return ranks.first(lambda: manifest.problem(path))
        problem = ranks.first(lambda: manifest.problem(path))
        if problem is not None:
            return problem
        files = ranks.first(lambda: manifest.read(path)["files"])
        for name, actual in _checksums(path, sorted(files), ranks).items():
            if isinstance(actual, str):
                return f"{name} cannot be read: {actual}"
            if actual != files[name]:
                return f"{name} is damaged: CRC-32 {actual['crc32']}, expected {files[name]['crc32']}"
        self._sound.add(path)
        return None

    def _begin(self, partial: Path) -> None:
        """Clears what killed runs left behind, and makes the folder to write into."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("step_*")):
            match = re.fullmatch(r"(step_\d{8,})((?:\.[a-z]+)+)", path.name)
            if match and match[2].endswith((PARTIAL, REMOVING)):
                _remove(path)
            elif match and match[2] == REPLACED:
                final = path.with_name(match[1])
                if final.exists():
                    _remove(path)
                else:
                    path.rename(final)
        partial.mkdir()

    def _commit(self, step: int, partial: Path, final: Path, files: dict[str, dict[str, Any] | str]) -> None:
        """Makes the written folder a checkpoint; from here on it counts, and older ones may go."""
        for name, entry in files.items():
            if isinstance(entry, str):
                raise OSError(f"{name} cannot be read back: {entry}")
        manifest.write(partial, step, files)
        replaced = final.with_name(final.name + REPLACED)
        if os.path.lexists(final):
            final.rename(replaced)
        partial.rename(final)
        manifest.sync_folder(self.folder)
        _remove(replaced)

    def _retire(self, newest: Path) -> None:
        """Removes sound checkpoints beyond ``keep``; a damaged one neither counts nor goes."""
        others = [path for _, path in self._list() if path != newest and manifest.problem(path) is None]
        for path in others[self.keep - 1 :] if self.keep else ():
            # Renamed first: a kill in the middle leaves nothing that bears a checkpoint's name.
            doomed = path.with_name(path.name + REMOVING)
            try:
                path.rename(doomed)
            except OSError as error:
                logger.warning("old checkpoint %s cannot be removed: %s", path, error.strerror)
            else:
                _remove(doomed)


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers by their names in the bare module, whatever wraps or shards it."""
    return get_model_state_dict(module)


def load_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Puts a loaded :func:`module_state` into the module."""
    set_model_state_dict(module, state)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State and options of an optimizer over parameters of ``module``, keyed by the parameters' names.

    A parameter that has not been stepped yet receives the state of its first step now (zeros, step 0), so that
    what is saved and what it is loaded into have the same keys; no weight changes.
    """
    _initialise(optimizer)
    return get_optimizer_state_dict(module, optimizer, options=_FLAT)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts a loaded :func:`optimizer_state` into the optimizer, its options (lr, betas, ...) included."""
    _initialise(optimizer)
    set_optimizer_state_dict(module, optimizer, state, options=_FLAT)


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    # DCP's own initialisation leaves Adam's step counter at 1 and skips optimizers of which one parameter has state.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in params if p.requires_grad and not optimizer.state.get(p)]
    if not fresh:
        return
    grads = [p.grad for p in params]
    options = [dict(group) for group in optimizer.param_groups]
    try:
        for p in params:
            p.grad = None
        for p in fresh:
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        optimizer.step()
    finally:
        for group, before in zip(optimizer.param_groups, options):
            group.update(before)
        for p, grad in zip(params, grads):
            p.grad = grad
    for p in fresh:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


def _state_dicts(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}


class _Ranks:
    """Object collectives of a group; in a single process they cost nothing."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, function: Callable[[], Any]) -> Any:
        """What the function gives or raises on rank 0, on every rank. Also a barrier."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:
                error = raised
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result


class _Writer(dcp.FileSystemWriter):
    """Shows the system's error: torch.save turns a full disk into a RuntimeError about file positions."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def _dcp(call: Callable, tensors: dict[str, Tensor], ranks: _Ranks, **storage: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        call(tensors, process_group=ranks.group, no_dist=not ranks.distributed, **storage)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # a BaseException: `except Exception` does not see it
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _remove(path: Path) -> None:
    """Removes a folder or file, if it is there; what cannot be removed is only a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error.strerror)


def _checksums(folder: Path, names: list[str], ranks: _Ranks, sync: bool = False) -> dict[str, Any]:
    """By name: {"size": bytes, "crc32": hex}, or the error as text. The ranks share the files among them."""
    mine = names[ranks.rank :: ranks.size]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(mine, pool.map(lambda name: manifest.checksum(folder / name, sync), mine)))
    return {name: entry for part in ranks.gather(found) for name, entry in part.items()}
