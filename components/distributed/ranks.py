"""What the ranks that save and load together say to each other: plain objects, errors, and who does what once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class Ranks:
    """Object collectives of a group; in a single process they cost nothing.

    Args:
        group: None is the default group, or this process alone.
    """

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

    def each(self, function: Callable[[], Any]) -> Any:
        """What the function gives on this rank; where it raises on any rank, it raises on all. Also a barrier."""
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        for rank, reason in enumerate(self.gather(None if error is None else f"{type(error).__name__}: {error}")):
            if reason is not None:
                raise error or RuntimeError(f"rank {rank}: {reason}")
        return result


def background_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A gloo group of the same ranks for collectives of another thread; made by all of them together.

    Collectives of one group must come in one order on all ranks, which two threads cannot promise; and a save in the
    background must not queue behind the kernels of the training.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if group is None:
        return dist.new_group(backend="gloo")
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
