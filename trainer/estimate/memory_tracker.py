"""Memory, FLOPs and communication of a step, tracked operation by operation on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from components.distributed.parallel import local
from components.monitor.flops import answer, formula

TEMPORARY = "activations and temporaries"
GATHERED = "weights gathered from other ranks"

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional

# Name; number of ring passes, in each of which every rank sends (n - 1) / n of the larger tensor's bytes; index of that
# tensor among the arguments, or None: n times the input.
COLLECTIVES = {
    c10d._allgather_base_.default: ("all-gather", 1, 0),
    c10d._reduce_scatter_base_.default: ("reduce-scatter", 1, 1),
    c10d.allgather_.default: ("all-gather", 1, 0),
    c10d.allreduce_.default: ("all-reduce", 2, 0),
    c10d.alltoall_base_.default: ("all-to-all", 1, 1),
    functional.all_gather_into_tensor.default: ("all-gather", 1, None),
    functional.reduce_scatter_tensor.default: ("reduce-scatter", 1, 0),
    functional.all_reduce.default: ("all-reduce", 2, 0),
    functional.all_reduce_.default: ("all-reduce", 2, 0),
}


@dataclass
class Traffic:
    """Bytes that one GPU sends, by collective, averaged over the GPUs of a ring.

    Attributes:
        within: bytes to GPUs of the same node.
        across: bytes to other nodes.
    """

    within: Counter[str] = field(default_factory=Counter)
    across: Counter[str] = field(default_factory=Counter)


class StepTracker(TorchDispatchMode):
    """Dispatch mode that tracks live bytes by kind, FLOPs and collectives.

    Meant for fake tensors: reading a value (``.item()``) returns 0. A storage counts once, however many tensors view
    it, from its first operation until Python frees it. Kernel workspaces and the allocator's rounding and
    fragmentation are not tracked.

    Args:
        gpus_per_node: consecutive ranks that share a machine.

    Attributes:
        repeats: multiplier of FLOPs and traffic, for a micro-batch that represents several.
        flops: a multiply-add counts as two.
        traffic: of collectives, modeled as rings: in an all-gather or reduce-scatter over n ranks, each rank sends
            (n - 1) / n of the whole tensor's bytes, in an all-reduce twice that. A ring passes through all ranks of a
            node before the next node, so that as many of its n links cross nodes as it has nodes.
    """

    def __init__(self, gpus_per_node: int = 1) -> None:
        super().__init__()
        self.gpus_per_node = gpus_per_node
        self.repeats = 1
        self.flops = 0
        self.traffic = Traffic()
        self._kinds: list[str] = []  # by storage, in the order of their first operation
        self._events: list[tuple[int, int]] = []  # (storage, change in bytes)
        self._live: dict[int, _Storage] = {}  # by address
        self._paused = False

    def hold(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Assign a kind to the storages of some tensors, and start tracking those that are not tracked yet."""
        for tensor in tensors:
            if tensor is not None:
                self._kinds[self._follow(local(tensor)).index] = kind

    def peak(self, elsewhere: Iterable[str] = ()) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by kind at the moment of peak memory, and the maximum of each kind at any moment.

        Args:
            elsewhere: kinds to exclude because they live on the host.
        """
        held: Counter[str] = Counter()
        at_peak: dict[str, int] = {}
        most: Counter[str] = Counter()
        total = highest = 0
        for storage, delta in self._events:
            kind = self._kinds[storage]
            if kind in elsewhere:
                continue
            total += delta
            held[kind] += delta
            most[kind] = max(most[kind], held[kind])
            if total > highest:
                highest, at_peak = total, dict(held)
        return at_peak, dict(most)

    def __enter__(self) -> StepTracker:
        self._resize = torch.UntypedStorage.resize_
        resize, live = self._resize, self._live

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if (known := live.get(storage._cdata)) is not None:
                # Only FSDP2 resizes storages: it keeps those of gathered weights and frees their memory.
                self._kinds[known.index] = GATHERED
                self._change(known, size)
            return result

        # To infer shapes, DTensor runs operations on unsharded fake tensors, which a real run never allocates.
        self._try = try_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def unfollowed(*args: Any) -> Any:
            self._paused = True
            try:
                return try_shapes(*args)
            finally:
                self._paused = False

        torch.UntypedStorage.resize_ = followed
        ShardingPropagator._propagate_tensor_meta_non_cached = unfollowed
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self._try
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # dispatched again on the wrapped tensors
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if (answered := answer(func, args)) is not None:
            return answered
        result = func(*args, **kwargs)
        if func in COLLECTIVES:
            self._communicate(func, args)
        elif count := formula(func):
            self.flops += count(*args, **kwargs, out_val=result) * self.repeats
        for tensor in _tensors(result):
            self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is None:
            known = self._live[storage._cdata] = _Storage(len(self._kinds))
            self._kinds.append(TEMPORARY)
            self._change(known, storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False
        return known

    def _forget(self, address: int) -> None:
        self._change(self._live.pop(address), 0)

    def _change(self, storage: _Storage, size: int) -> None:
        if size != storage.size:
            self._events.append((storage.index, size - storage.size))
            storage.size = size

    def _communicate(self, func, args: tuple) -> None:
        name, rounds, side = COLLECTIVES[func]
        ranks = _ranks(args)
        whole = args[side or 0]
        size = sum(t.numel() * t.element_size() for t in _tensors(whole)) * (len(ranks) if side is None else 1)
        sent = rounds * size * (len(ranks) - 1) / len(ranks) * self.repeats
        nodes = len({rank // self.gpus_per_node for rank in ranks})
        crossing = nodes / len(ranks) if nodes > 1 else 0.0
        self.traffic.within[name] += sent * (1 - crossing)
        self.traffic.across[name] += sent * crossing


@dataclass
class _Storage:
    index: int
    size: int = 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _ranks(args: tuple) -> list[int]:
    """Ranks of the process group among a collective's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg))
            except RuntimeError:  # a reduce op, not a group
                continue
        if isinstance(arg, dist.ProcessGroup):
            return dist.get_process_group_ranks(arg)
    name = next(a for a in reversed(args) if isinstance(a, str))
    return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))
