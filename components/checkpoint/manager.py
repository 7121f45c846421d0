"""Atomic checkpoints built on torch.distributed.checkpoint (DCP): a checkpoint is either complete or absent.

A checkpoint is a folder ``step_00000100`` with the tensors (DCP files: each rank writes its shards, any number of
ranks can read them), ``meta.json`` (the state's structure and its plain Python values) and ``manifest.json`` (size
and CRC-32 of every file). It is written as ``step_00000100.partial`` and renamed once everything is on disk.
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
from components.checkpoint.reader import Reader, foreign
from components.checkpoint.tensors import Writer, call_dcp, disk_bytes, reason, share, stage
from components.distributed.ranks import Ranks, background_group
from components.files import manifest

META = "meta.json"

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run.

    With a process group, every method is collective: all ranks must call it, in the same order.

    Args:
        folder: directory of the checkpoints, shared by all ranks; created by the first save.
        keep: number of newest checkpoints to keep after a save; 0 keeps all.
        keep_every: additionally keep checkpoints whose step is a multiple of this, forever; 0 disables it.
        group: ranks that save and load together; None: the default group, or a single process.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 3, keep_every: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        self._folder = CheckpointFolder(Path(folder), keep, keep_every)
        self.group = group
        # Checkpoints that this process has verified or written, with the state of their files at that time.
        self._sound: dict[Path, list[tuple[str, int, int]]] = {}
        self._pending: Future[Path] | None = None
        self._background: Ranks | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` as the checkpoint of ``step``, then remove old checkpoints as ``keep`` says.

        Args:
            step: optimizer steps taken; an existing checkpoint of that step is replaced.
            state: nested dicts, lists and tuples of tensors (including DTensors) and plain values (None, bool, int,
                float, str), or objects with ``state_dict`` and ``load_state_dict``. Keys must be the same on every
                rank; plain values are saved from rank 0, tensors other than DTensors from any one rank.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the checkpoint could not be written, or a previous :meth:`save_async` failed, in which case
                this save was not attempted (call :meth:`wait` first to distinguish). Earlier checkpoints are intact.
            TypeError: the state contains a value of another type.
        """
        self.wait()
        ranks = Ranks(self.group)
        meta, tensors = self._begin(step, state, ranks)
        return self._write(step, meta, tensors, ranks)

    def save_async(self, step: int, state: Mapping[str, Any]) -> None:
        """Save in the background; return once the state is copied and may be modified.

        The copies occupy host memory until the save ends: on each rank as much as the rank writes. The checkpoint
        counts only when everything is on disk; :meth:`wait` reports the outcome. The interpreter waits for a pending
        save before it exits; destroying the process group before :meth:`wait` makes the save fail.

        Raises:
            CheckpointError: there is not enough space, the folder is not writable, or a previous :meth:`save_async`
                failed, in which case this save was not attempted.
            TypeError: the state contains a value of another type.
        """
        self.wait()
        if self._background is None:
            self._background = Ranks(background_group(self.group))
        ranks = self._background
        meta, tensors = self._begin(step, state, ranks)
        with self._failing(step, ranks):
            copies = ranks.each(lambda: stage(tensors))
        # One thread that runs what `save` runs, not dcp.async_save: in torch 2.11 that does not copy CPU tensors, and
        # checksums, manifest and rename would need a second thread to wait for its future.
        pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = pool.submit(self._write, step, meta, copies, ranks, staged=True)
        pool.shutdown(wait=False)

    def wait(self) -> Path | None:
        """Wait for the pending save, if any, and clear it.

        Returns:
            The checkpoint's folder; None if nothing was pending.

        Raises:
            CheckpointError: it could not be written (raised on all ranks); earlier checkpoints are intact.
        """
        self._join()
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def latest(self) -> Path | None:
        """The newest valid checkpoint, or None; see :meth:`candidates`."""
        return next(self.candidates(), None)

    def candidates(self, up_to: int | None = None) -> Iterator[Path]:
        """Yield valid checkpoints, newest first; each is read in full and compared with its manifest when reached.

        Args:
            up_to: ignore checkpoints of later steps.

        A damaged or unfinished checkpoint is skipped with a warning that names the file and the problem. Waits for a
        pending save first; if that failed, :meth:`wait` will raise its error.
        """
        self._join()
        ranks = Ranks(self.group)
        for path in ranks.first(lambda: [p for s, p in self._folder.list() if up_to is None or s <= up_to]):
            problem = self._verify(path, ranks)
            if problem is None:
                yield path
            elif ranks.rank == 0:
                logger.warning("skipping checkpoint %s: %s", path, problem)

    def count(self) -> int:
        """Number of checkpoints, sound or not."""
        self._join()
        return Ranks(self.group).first(lambda: len(self._folder.list()))

    def discard(self, beyond: int) -> None:
        """Remove the checkpoints of steps later than ``beyond``, so that no run resumes from them."""
        self._join()
        Ranks(self.group).first(lambda: self._folder.discard(beyond))

    def load(self, step_or_path: int | str | Path, template: Mapping[str, Any]) -> dict[str, Any]:
        """Load a checkpoint into ``template``: tensors in place, plain values into the returned state.

        Top-level keys that the template lacks are not read; below that level keys must match exactly. Waits for a
        pending save first; if that failed, :meth:`wait` will raise its error.

        Args:
            step_or_path: a step in this folder, or the path of any checkpoint.
            template: as passed to :meth:`save`, with tensors of the same shapes and dtypes (any sharding).

        Returns:
            The state: the template's tensors and the checkpoint's plain values. Objects with ``load_state_dict``
            have loaded their part.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or keys, shapes or dtypes do not match (the message
                lists the first eight of each kind).
        """
        path, meta, ranks = self._open(step_or_path)
        state, tensors, problems = state_tree.match(_state_dicts(template), meta)
        if problems:
            raise CheckpointError(
                f"checkpoint {path} does not match this run:\n"
                + "\n".join(
                    f"  {len(keys)} {title}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
                    for title, keys in problems.items()
                )
                + "\nResume with the config that wrote it, or start a new run in another folder."
            )
        self._fill(path, tensors, ranks)
        for key, value in template.items():
            if isinstance(value, Stateful):
                value.load_state_dict(state[key])
        return state

    def read(self, step_or_path: int | str | Path, paths: Sequence[str]) -> dict[str, Any]:
        """Read parts of a checkpoint without a template; every rank gets full, unsharded tensors in host memory.

        Args:
            step_or_path: as for :meth:`load`.
            paths: dotted paths, such as "config" or "modules.tokenizer".

        Returns:
            The parts by path; paths that the checkpoint lacks are omitted.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
        """
        path, meta, ranks = self._open(step_or_path)
        try:
            parts = {name: found for name in paths if (found := state_tree.part(meta, name)) is not None}
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} is refused: {META} does not describe tensors ({error})"
            ) from error
        self._fill(path, {key: t for _, tensors in parts.values() for key, t in tensors.items()}, ranks)
        return {name: value for name, (value, _) in parts.items()}

    def _open(self, step_or_path: int | str | Path) -> tuple[Path, dict[str, Any], Ranks]:
        """Verify a checkpoint; return its path and its encoded state."""
        self._join()
        ranks = Ranks(self.group)
        path = self._folder.final(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)
        problem = self._verify(path, ranks)
        if problem is not None:
            there = ranks.first(lambda: ", ".join(p.name for _, p in self._folder.list())) or "none"
            raise CheckpointError(f"checkpoint {path} cannot be used: {problem} (in {self._folder.path}: {there})")
        return path, ranks.first(lambda: json.loads((path / META).read_text())), ranks

    def _fill(self, path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        """Load the checkpoint's tensors of these names in place."""
        if not tensors:
            return
        try:
            reader = ranks.each(lambda: Reader(path))
            call_dcp(dcp.load, tensors, ranks, storage_reader=reader)
        except (Exception, CheckpointException) as error:
            written = ranks.first(lambda: manifest.read(path)["torch"])
            if code := foreign(error):
                raise CheckpointError(
                    f"checkpoint {path} is refused: {code}, and reading that could run code. No supported torch writes "
                    f"that (it states torch {written}); get the checkpoint again from a source that you trust."
                ) from None
            raise CheckpointError(
                f"checkpoint {path}, written by torch {written}, cannot be read by torch {torch.__version__}: "
                f"{reason(error)}. Reading it requires the torch version that wrote it, or a newer one."
            ) from error

    def _verify(self, path: Path, ranks: Ranks, *, threads: bool = True) -> str | None:
        """Return what is wrong with a checkpoint, or None; the same on every rank."""
        problem, present = ranks.first(lambda: (manifest.problem(path), _file_times(path)))
        if problem is not None or self._sound.get(path) == present:
            return problem
        files = ranks.first(lambda: manifest.read(path)["files"])
        for name, actual in _checksums(path, sorted(files), ranks, threads=threads).items():
            if isinstance(actual, str):
                return f"{name} cannot be read: {actual}"
            if actual != files[name]:
                return f"{name} is damaged: CRC-32 {actual['crc32']}, expected {files[name]['crc32']}"
        self._sound[path] = present
        return None

    def _join(self) -> None:
        if self._pending is not None:
            concurrent.futures.wait([self._pending])

    def _begin(self, step: int, state: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Create the partial folder; return the encoded state and the tensors that this rank writes."""
        meta, tensors = state_tree.encode(_state_dicts(state))
        tensors = share(tensors, ranks)
        with self._failing(step, ranks):
            need = sum(ranks.gather(disk_bytes(tensors)))
            ranks.first(lambda: self._folder.begin(step, need))
        return meta, tensors

    def _write(
        self, step: int, meta: dict[str, Any], tensors: dict[str, Tensor], ranks: Ranks, *, staged: bool = False
    ) -> Path:
        """Write the files and commit the checkpoint. ``staged``: the tensors are copies made by :func:`stage`."""
        final, partial = self._folder.final(step), self._folder.partial(step)
        with self._failing(step, ranks):
            # 0: otherwise DCP's copies in a new thread would use GPU 0, whichever GPU this rank has.
            writer = Writer(partial, **({"per_thread_copy_ahead": 0} if staged else {}))
            call_dcp(dcp.save, tensors, ranks, storage_writer=writer)
            ranks.first(lambda: (partial / META).write_text(json.dumps(meta)))
            files = _checksums(
                partial, ranks.first(lambda: sorted(os.listdir(partial))), ranks, sync=True, threads=False
            )
            ranks.first(lambda: self._folder.commit(step, files))
        self._sound[final] = ranks.first(lambda: _file_times(final))
        self._retire(final, ranks)
        return final

    def _retire(self, newest: Path, ranks: Ranks) -> None:
        """Apply ``keep`` and ``keep_every``. Damaged checkpoints are neither counted nor removed.

        A checkpoint counts if it has been verified in full, here or before, and its files have not changed since.
        """
        keep = self._folder.keep
        others = ranks.first(lambda: [entry for entry in self._folder.list() if entry[1] != newest])
        if not keep or len(others) < keep:
            return
        kept, old = 1, []
        for step, path in others:
            if kept == keep:
                old.append((step, path))
            elif (problem := self._verify(path, ranks, threads=False)) is None:
                kept += 1
            elif ranks.rank == 0:
                logger.warning("checkpoint %s does not count and stays: %s", path, problem)
        ranks.first(lambda: self._folder.retire(old))

    @contextmanager
    def _failing(self, step: int, ranks: Ranks) -> Iterator[None]:
        """Context manager that turns any error into a CheckpointError and removes the partial folder."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(self._folder.partial(step), ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._folder.path}: {reason(error)}. Its "
                "partial files were removed; earlier checkpoints are intact. Free disk space or choose another folder."
            ) from error


def _state_dicts(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}


def _file_times(folder: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of the last change in ns) of each file; empty if the folder cannot be read."""
    try:
        return sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(folder))
    except OSError:
        return []


def _checksums(
    folder: Path, names: list[str], ranks: Ranks, *, sync: bool = False, threads: bool = True
) -> dict[str, Any]:
    """{"size": bytes, "crc32": hex} or an error message by file name. Collective: the ranks divide the files.

    After a save, ``threads`` is off: each rank has few files then, and an exiting interpreter cannot start threads.
    """
    mine = names[ranks.rank :: ranks.size]

    def checksum(name: str) -> dict[str, Any] | str:
        return manifest.checksum(folder / name, sync)

    if not threads:
        found = {name: checksum(name) for name in mine}
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(mine, pool.map(checksum, mine)))
    return {name: entry for part in ranks.gather(found) for name, entry in part.items()}
