"""Checkpoints that are complete or absent, on torch.distributed.checkpoint (DCP).

A checkpoint is a folder ``step_00000100`` with the tensors (DCP's files: every rank writes its shards, any number
of ranks reads them), ``meta.json`` (the tree of the state and its plain Python values) and ``manifest.json`` (size
and CRC-32 of every file). It is written as ``step_00000100.partial`` and renamed when everything is on the disk.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

from components.checkpoint import state_tree
from components.checkpoint.folder import CheckpointError, CheckpointFolder
from components.checkpoint.tensors import Writer, call_dcp, disk_bytes, reason, share, stage
from components.distributed.ranks import Ranks, background_group
from components.files import manifest

META = "meta.json"

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run, in one folder.

    With a process group, every method is collective: all of its ranks call it, in the same order. Only ``pending``
    and ``done`` are answered by each rank alone.

    Args:
        folder: where the checkpoints lie, shared by all ranks; made by the first save.
        keep: how many of the newest stay after a save; 0 keeps all.
        keep_every: steps; checkpoints of its multiples stay for ever, besides the newest. 0: none.
        group: the ranks that save and load together; None is the default group, or this process alone.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 3, keep_every: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        self._folder = CheckpointFolder(Path(folder), keep, keep_every)
        self.group = group
        self._sound: set[Path] = set()  # what this process has verified or written
        self._pending: Future[Path] | None = None
        self._background: Ranks | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes ``state`` as the checkpoint of ``step``, then removes those that are not to be kept.

        Args:
            step: optimizer steps taken; an existing checkpoint of that step is replaced.
            state: nested dicts, lists and tuples of tensors (DTensors too) and plain values (None, bool, int,
                float, str), or objects with ``state_dict`` and ``load_state_dict``. The same keys on every rank;
                of plain values rank 0's are kept, of a tensor that is no DTensor any one rank's.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it could not be written, or a :meth:`save_async` before it, in which case this one was
                not tried (:meth:`wait` first, to tell them apart). Earlier checkpoints are whole.
            TypeError: the state holds a value of another type.
        """
        self.wait()
        ranks = Ranks(self.group)
        meta, tensors = self._begin(step, state, ranks)
        return self._write(step, meta, tensors, ranks)

    def save_async(self, step: int, state: Mapping[str, Any]) -> None:
        """:meth:`save` in the background: returns when the state is copied, so that all of it may be changed.

        The copies take the memory of the host, on each rank as much as it writes, until the save is done. Nothing
        counts before everything is on the disk; :meth:`wait` tells how it ended. An interpreter that exits waits
        for a pending save; a process group that is destroyed before :meth:`wait` makes it fail.

        Raises:
            CheckpointError: there is no room for it, the folder cannot be written, or a :meth:`save_async` before
                it failed, in which case this one was not tried.
            TypeError: the state holds a value of another type.
        """
        self.wait()
        if self._background is None:
            self._background = Ranks(background_group(self.group))
        ranks = self._background
        meta, tensors = self._begin(step, state, ranks)
        with self._failing(step, ranks):
            copies = ranks.each(lambda: stage(tensors))
        # One thread that does what `save` does, rather than dcp.async_save: that copies no tensors of the CPU in 2.11,
        # and its future ends before checksums, manifest and rename, which would need a second thread to await it.
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = pool.submit(self._write, step, meta, copies, ranks, staged=True)
        pool.shutdown(wait=False)

    def wait(self) -> Path | None:
        """Waits for the pending save, if there is one, and forgets it.

        Returns:
            The checkpoint's folder; None if nothing was pending.

        Raises:
            CheckpointError: it could not be written (on all ranks alike); earlier checkpoints are whole.
        """
        self._join()
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    @property
    def pending(self) -> bool:
        """Whether a :meth:`save_async` awaits its :meth:`wait`. Not collective; the same on all ranks."""
        return self._pending is not None

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once on this rank.

        Not collective, and ranks may differ for a moment: reduce it over the ranks before acting on it.
        """
        return self._pending is None or self._pending.done()

    def latest(self) -> Path | None:
        """The newest sound checkpoint, or None; see :meth:`candidates`."""
        return next(self.candidates(), None)

    def candidates(self, up_to: int | None = None) -> Iterator[Path]:
        """Sound checkpoints, newest first, each read through and compared with its manifest when its turn comes.

        Args:
            up_to: leave out those of later steps.

        A damaged or unfinished one is skipped with a warning that names the file and what is wrong with it. A
        pending save is awaited first; if it failed, that is left for :meth:`wait` to tell.
        """
        self._join()
        ranks = Ranks(self.group)
        for path in ranks.first(lambda: [p for s, p in self._folder.list() if up_to is None or s <= up_to]):
            problem = self._verify(path, ranks)
            if problem is None:
                yield path
            elif ranks.rank == 0:
                logger.warning("checkpoint %s is skipped: %s", path, problem)

    def discard(self, beyond: int) -> None:
        """Removes the checkpoints of steps later than ``beyond``: nobody is to go on from them."""
        self._join()
        Ranks(self.group).first(lambda: self._folder.discard(beyond))

    def load(self, step_or_path: int | str | Path, template: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a checkpoint into ``template``: tensors in place, plain values into the returned state.

        A top-level key that the template lacks is not read; below that level the template must match exactly. A
        pending save is awaited first; if it failed, that is left for :meth:`wait` to tell.

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
        path, meta, ranks = self._open(step_or_path)
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
        self._fill(path, tensors, ranks)
        for key, value in template.items():
            if isinstance(value, Stateful):
                value.load_state_dict(state[key])
        return state

    def read(self, step_or_path: int | str | Path, paths: Sequence[str]) -> dict[str, Any]:
        """Parts of a checkpoint, without a template: each rank gets all of them, whole, in the host's memory.

        Args:
            step_or_path: as for :meth:`load`.
            paths: dotted, as "config" or "modules.tokenizer".

        Returns:
            By path; a path that the checkpoint lacks is left out.

        Raises:
            CheckpointError: no such checkpoint, or it is damaged.
        """
        path, meta, ranks = self._open(step_or_path)
        parts = {name: found for name in paths if (found := state_tree.part(meta, name)) is not None}
        self._fill(path, {key: t for _, tensors in parts.values() for key, t in tensors.items()}, ranks)
        return {name: value for name, (value, _) in parts.items()}

    def _open(self, step_or_path: int | str | Path) -> tuple[Path, dict[str, Any], Ranks]:
        """A sound checkpoint's path and its encoded state."""
        self._join()
        ranks = Ranks(self.group)
        path = self._folder.final(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)
        problem = self._verify(path, ranks)
        if problem is not None:
            there = ranks.first(lambda: ", ".join(p.name for _, p in self._folder.list())) or "none"
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem} (in {self._folder.path}: {there})")
        return path, ranks.first(lambda: json.loads((path / META).read_text())), ranks

    def _fill(self, path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        """Reads the tensors of a checkpoint, each with its name there, in place."""
        if not tensors:
            return
        try:
            call_dcp(dcp.load, tensors, ranks, storage_reader=dcp.FileSystemReader(path))
        except (Exception, CheckpointException) as error:
            written = ranks.first(lambda: manifest.read(path)["torch"])
            raise CheckpointError(
                f"checkpoint {path}, written by torch {written}, cannot be read by torch {torch.__version__}: "
                f"{reason(error)}. A checkpoint needs the version of torch that wrote it, or a newer one."
            ) from error

    def _verify(self, path: Path, ranks: Ranks) -> str | None:
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

    def _join(self) -> None:
        if self._pending is not None:
            concurrent.futures.wait([self._pending])

    def _begin(self, step: int, state: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Makes room and the folder to write into; gives the tree of the state, and the tensors this rank writes."""
        meta, tensors = state_tree.encode(_state_dicts(state))
        tensors = share(tensors, ranks)
        with self._failing(step, ranks):
            need = sum(ranks.gather(disk_bytes(tensors)))
            ranks.first(lambda: self._folder.begin(step, need))
        return meta, tensors

    def _write(
        self, step: int, meta: dict[str, Any], tensors: dict[str, Tensor], ranks: Ranks, *, staged: bool = False
    ) -> Path:
        """Fills the begun folder and makes it a checkpoint. ``staged``: the tensors are :func:`stage`'s copies."""
        final, partial = self._folder.final(step), self._folder.partial(step)
        with self._failing(step, ranks):
            # 0: DCP's copying from the GPU would use GPU 0 in a new thread, whichever GPU this rank has.
            writer = Writer(partial, **({"per_thread_copy_ahead": 0} if staged else {}))
            call_dcp(dcp.save, tensors, ranks, storage_writer=writer)
            ranks.first(lambda: (partial / META).write_text(json.dumps(meta)))
            files = _checksums(partial, ranks.first(lambda: sorted(os.listdir(partial))), ranks, sync=True)
            ranks.first(lambda: self._folder.commit(step, files))
        self._sound.add(final)
        ranks.first(lambda: self._folder.retire(final))
        return final

    @contextmanager
    def _failing(self, step: int, ranks: Ranks) -> Iterator[None]:
        """Turns what goes wrong inside into a CheckpointError, and removes the half-written folder."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(self._folder.partial(step), ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._folder.path}: {reason(error)}. Nothing "
                "of it was kept; earlier checkpoints are untouched. Make room, or choose a folder that can be written."
            ) from error


def _state_dicts(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}


def _checksums(folder: Path, names: list[str], ranks: Ranks, sync: bool = False) -> dict[str, Any]:
    """By name: {"size": bytes, "crc32": hex}, or the error as text. The ranks share the files among them."""
    mine = names[ranks.rank :: ranks.size]

    def checksum(name: str) -> dict[str, Any] | str:
        return manifest.checksum(folder / name, sync)

    if sync:  # after a save each rank has about one file; and an interpreter that exits starts no threads any more
        found = {name: checksum(name) for name in mine}
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(mine, pool.map(checksum, mine)))
    return {name: entry for part in ranks.gather(found) for name, entry in part.items()}
