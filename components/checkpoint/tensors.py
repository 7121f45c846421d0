"""Writing a checkpoint's tensors: assigning them to ranks, staging copies on the host, and the DCP writer."""

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

# Bound on the disk space of a tensor or shard besides its values: headers and index entries take about 2 KB.
OVERHEAD_BYTES = 4096


def share(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Select the tensors that this rank writes, so that exactly one replica of each is written.

    DCP deduplicates replicas too, but only after every rank has staged everything: with replicated parameters, eight
    processes would hold eight copies in their machine's memory.
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

    # By size, to balance the ranks. The order is the same on all ranks: a DTensor's numel is that of the full tensor.
    names = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    chosen = {name for turn, name in enumerate(names) if mine(tensors[name], turn)}
    return {name: tensor for name, tensor in tensors.items() if name in chosen}


def disk_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Upper bound on the disk space of this rank's parts of the tensors, in bytes."""
    return sum(_local(tensor).nbytes + OVERHEAD_BYTES for tensor in tensors.values())


@torch.no_grad()
def stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, synchronously; a DTensor becomes a DTensor with a copy of this rank's shard.

    Not pinned: PyTorch rounds pinned memory up to powers of two and never frees it (15.1 GiB for the 11.1 GiB of a
    SiT-XL REPA-E run), and the copy would be only a second faster, once in thousands of steps.

    Each copy has a storage of exactly its own size. DCP would clone any other when writing it, and a parallel clone in
    the writer's thread would start a second OpenMP thread pool, whose spinning slows training on CPUs by a third.
    """
    copies = {name: torch.empty_like(tensor, device="cpu", requires_grad=False) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _local(copies[name]).copy_(_local(tensor))
    return copies


class Writer(dcp.FileSystemWriter):
    """Raises the underlying OSError: torch.save reports a full disk as a RuntimeError about file positions."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def call_dcp(call: Callable, tensors: dict[str, Tensor], ranks: Ranks, **storage: Any) -> None:
    """Call ``dcp.save`` or ``dcp.load`` on these ranks."""
    # Not in catch_warnings, which would reset filters set by other threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    ranks.check()  # DCP would save this rank's part as if it were alone
    call(tensors, process_group=ranks.group, no_dist=not ranks.distributed, **storage)


def reason(error: BaseException) -> str:
    """One-line description of an error for users. Re-raises a KeyboardInterrupt or SystemExit wrapped by DCP."""
    if isinstance(error, CheckpointException):  # a BaseException, so `except Exception` does not catch it
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
