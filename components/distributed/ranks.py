"""Object collectives: gather, run on rank 0 and broadcast, run everywhere."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Ranks:
    """Object collectives of a process group; free in a single process.

    Args:
        group: None: the default group, or a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    def check(self) -> None:
        """Raise RuntimeError if the process groups have been destroyed, as at the end of a run, by another thread.

        The collectives of such a group would wait for ranks that no longer take part, and keep the process from ending.
        """
        if self.distributed and not dist.is_initialized():
            raise RuntimeError("the process group was destroyed meanwhile")

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        self.check()
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, function: Callable[[], Any]) -> Any:
        """Run the function on rank 0; return its result, or raise its exception, on every rank. Also a barrier."""
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

    def each(self, function: Callable[[], Any]) -> Any:
        """Run the function on every rank; return this rank's result, or raise on all if one fails. A barrier."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        for rank, reason in enumerate(self.gather(None if error is None else f"{type(error).__name__}: {error}")):
            if reason is not None:
                raise error or RuntimeError(f"rank {rank}: {reason}")
        return result


def patient_ranks() -> Ranks:
    """Ranks whose collectives wait as long as it takes, for work that is not divided equally, such as writing files.

    A rank that ends is noticed at once all the same. Collective.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(None)
    return Ranks(dist.new_group(backend="gloo", timeout=timedelta(days=30)))


def background_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Create a gloo group of the same ranks for use by another thread; collective.

    Collectives of one group must run in the same order on all ranks, which two threads cannot guarantee, and a
    background save must not wait for training kernels.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if group is None:
        return dist.new_group(backend="gloo")
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
