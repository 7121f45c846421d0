"""The tensors of a checkpoint on their way to the disk: which rank writes which, copies to write from, the writer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from components.distributed.ranks import Ranks

# On the disk beside the values of one tensor or shard (headers, its names in the lists): about 2 KB.
OVERHEAD_BYTES = 4096


def share(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this rank writes its part, so that of all replicas one is written.

    DCP removes replicas too, but only when every rank has copied everything: with replicated parameters, eight
    processes of one machine would hold eight copies in its memory.
    """

    def mine(tensor: Tensor, turn: int) -> bool:
        if not isinstance(tensor, DTensor):
            return turn % ranks.size == ranks.rank
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return False
        replica, replicas = 0, 1
        for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements):
            if placement.is_replicate():
                replica, replicas = replica * size + place, replicas * size
        return turn % replicas == replica

    # By size, so that turns are fair. The same order everywhere: a DTensor's numel is that of the whole.
    names = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    chosen = {name for turn, name in enumerate(names) if mine(tensors[name], turn)}
    return {name: tensor for name, tensor in tensors.items() if name in chosen}


def disk_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Upper bound of what this rank's parts of the tensors take on the disk."""
    return sum(_local(tensor).nbytes + OVERHEAD_BYTES for tensor in tensors.values())


@torch.no_grad()
def stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the memory of the host, complete when this returns.

    Not pinned: PyTorch rounds pinned memory up to powers of two and never returns it (15.1 GiB for the 11.1 GiB of a
    SiT-XL REPA-E run), for a copy that is a second faster, once in thousands of steps.

    A DTensor's copy is a DTensor with the copy of this rank's shard. Each copy has a storage of its own size: DCP
    clones others when it writes them, and a parallel copy in its thread would start a second team of OpenMP threads,
    whose spinning slows a training on CPUs by a third.
    """
    copies = {name: torch.empty_like(tensor, device="cpu", requires_grad=False) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _local(copies[name]).copy_(_local(tensor))
    return copies


class Writer(dcp.FileSystemWriter):
    """Shows the system's error: torch.save turns a full disk into a RuntimeError about file positions."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def call_dcp(call: Callable, tensors: dict[str, Tensor], ranks: Ranks, **storage: Any) -> None:
    """``dcp.save`` or ``dcp.load`` among these ranks."""
    # Not in catch_warnings, which would put back other threads' filters.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    call(tensors, process_group=ranks.group, no_dist=not ranks.distributed, **storage)


def reason(error: BaseException) -> str:
    """One line for users. A KeyboardInterrupt or SystemExit, which DCP wraps, is raised again."""
    if isinstance(error, CheckpointException):  # a BaseException: `except Exception` does not see it
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
