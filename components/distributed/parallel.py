"""Process group setup, data parallelism, tensor collectives and compilation.

Every strategy is FSDP2 on a (replicate, shard) mesh: ``fsdp`` is (1, n), ``ddp`` is (n, 1), ``hsdp`` anything in
between. So all share one code path, which overlaps gradient reduction with the backward pass and supports frozen
passes and methods other than ``forward``, unlike DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from components.contracts import Network, units_of

Strategy = Literal["fsdp", "hsdp", "ddp", "none"]


class ParallelError(Exception):
    """The parallel settings do not fit the ranks, or a rank was lost; the message says what to do."""


@dataclass(frozen=True)
class World:
    """This process and the number of processes in the run.

    Attributes:
        rank: in [0, size).
        size: number of processes.
        device: device of this process.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(timeout_s: float = 600.0) -> World:
    """Join the process group described by torchrun's environment variables: NCCL for GPUs, gloo for CPUs.

    Args:
        timeout_s: seconds that a collective waits for a lost rank before it fails.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return World(rank, size, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def lost_rank_named(where: Callable[[], str]) -> Iterator[None]:
    """Context manager that turns communication errors into a :class:`ParallelError` that says what to do.

    Args:
        where: returns this rank's progress for the message, such as "at step 100".
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors.
        text = str(error)
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", text):
            raise
        raise ParallelError(
            f"this rank lost another one {where()} ({text.splitlines()[0][:200]}). The output of the rank that failed "
            "shows the cause (LOG_RANK shows ranks other than 0). All ranks exit; the same command resumes from the "
            "newest checkpoint, and MAX_RESTARTS=n makes run_train.sh do so automatically"
        ) from error


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Sharding:
    """How parameters are sharded over the ranks.

    Attributes:
        mesh: (replicate, shard); parameters are split into ``shard`` shards, each held by ``replicate`` ranks.
        param_dtype: dtype in which full weights are gathered and used (bf16); None: their own. Shards, gradient
            reduction and optimizer stay in fp32.
        reshard_after_forward: free a unit's full weights between its forward and backward pass: saves memory at the
            cost of one more all-gather.
        cpu_offload: keep shards, gradients and optimizer state on the host.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(replicate, shard)."""
        return self.mesh.size(0), self.mesh.size(1)


def mesh_shape(strategy: Strategy, world_size: int, shard: int) -> tuple[int, int]:
    """Mesh shape (replicate, shard) of a strategy.

    Args:
        strategy: fsdp, hsdp, ddp or none.
        world_size: number of ranks.
        shard: for hsdp: number of ranks over which one copy of the weights is sharded.

    Raises:
        ParallelError: ``none`` with several ranks, or hsdp with a ``shard`` that does not divide the number of ranks.
    """
    if strategy == "none" and world_size > 1:
        raise ParallelError(
            f"parallel.strategy = 'none' needs a single process, but there are {world_size}; choose fsdp, hsdp or ddp, "
            "or start one process (NGPU=1)"
        )
    if strategy != "hsdp":
        return (1, world_size) if strategy == "fsdp" else (world_size, 1)
    if shard < 1 or world_size % shard:
        fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ParallelError(
            f"parallel.shard = {shard} does not divide {world_size} ranks; allowed: {', '.join(map(str, fits))}"
        )
    return world_size // shard, shard


def make_mesh(device_type: str, shape: tuple[int, int]) -> DeviceMesh:
    """Create the (replicate, shard) mesh; neighboring ranks, which share a machine, shard one copy of the weights."""
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, sharding: Sharding, learns: bool = True) -> None:
    """Shard a module's parameters with FSDP2: each of ``units()`` separately, then the rest.

    Gradients are averaged over all ranks. Buffers are replicated; updates to them must be identical on all ranks.

    Args:
        module: on any device, including meta.
        sharding: see :class:`Sharding`.
        learns: whether a backward pass follows each forward pass and frees the gathered weights.
    """
    units = list(units_of(module))
    for unit in units:
        _fully_shard(unit, sharding, sharding.reshard_after_forward, _keeps_fp32(module, unit))
        _wrap_methods(unit)
    covered = {p for unit in units for p in unit.parameters()}
    if any(p not in covered for p in module.parameters()):
        # The backward pass needs the root's weights first, so freeing them would save nothing. Without a backward pass
        # they would never be freed, and become stale when the shards change.
        _fully_shard(module, sharding, not learns, _keeps_fp32(module))
        _wrap_methods(module)
        # A posterior's mean is a view of the encoder's output; nothing writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _wrap_methods(module: nn.Module) -> None:
    for method in module.forward_methods if isinstance(module, Network) else ():
        register_fsdp_forward_method(module, method)


def _fully_shard(module: nn.Module, sharding: Sharding, reshard: bool, keep_fp32: bool) -> None:
    dtype = None if keep_fp32 else sharding.param_dtype
    # Do not cast inputs: times t would be rounded to bf16, and autocast already casts where that is safe.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None,
                                  cast_forward_inputs=False)  # fmt: skip
    pinned = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pinned) if sharding.cpu_offload else OffloadPolicy()
    # If every rank holds all weights, resharding saves little, and gathering is a copy.
    reshard = reshard and sharding.shape[1] > 1
    # A second mesh dimension costs another reduction per unit and squares the placements that DTensor searches per op.
    mesh = sharding.mesh if sharding.shape[0] > 1 else sharding.mesh["shard"]
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)


def _keeps_fp32(*modules: nn.Module) -> bool:
    return any(isinstance(module, Network) and module.keep_fp32 for module in modules)


def sharded_parts(*modules: nn.Module) -> Iterator[FSDPModule]:
    """Yield all submodules (and the modules themselves) that :func:`shard` has wrapped."""
    if not dist.is_initialized():  # nothing is wrapped; the walk below is called several times a step
        return
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                yield part


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over all ranks, in place, without blocking the host on a GPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gather_floats(*values: float) -> list[list[float]]:
    """Return the host values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(values)]
    found = [torch.empty(len(values), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor(values, dtype=torch.float64))
    return [x.tolist() for x in found]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, on every rank; all must have the same number of rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows.contiguous())
    return torch.cat(found)


def reshard(*modules: nn.Module) -> None:
    """Free full weights left by forward passes without a backward pass, so that the next use gathers current ones."""
    for part in sharded_parts(*modules):
        part.reshard()


def settle(*modules: nn.Module) -> None:
    """Run FSDP2's lazy initialization while parameters are trainable: torch 2.11 fixes gradient dtypes there."""
    for part in sharded_parts(*modules):  # yields a root before its units
        part._get_fsdp_state()._lazy_init()  # no-op after the first call


def compile_units(module: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile each of ``module.units()``, or the whole module if it has none; compile time does not grow with depth.

    Beside the units, the methods that ``module.compiled_methods()`` returns are compiled, unless a part of their module
    has a forward hook (:class:`components.nn.last_layer.LastLayer`), which needs eager code.

    All dimensions except the batch are marked static. Stages of one class share code, and the compiler would otherwise
    make the spatial sizes of all but the first stage symbolic: slower kernels, no layout optimization for
    convolutions, and a crash on some torch versions.
    """
    # Recompiles are counted per code object, which stages of different shapes share, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Inductor stores what several kernels use if computing it takes more reads than this. The default of 4 stores a
    # gradient in fp32 in each group norm; with 8, group norms move a third fewer bytes, and others change by 0.03 %.
    from torch._inductor import config  # a second to import

    config.realize_reads_threshold = max(config.realize_reads_threshold, 8)
    if torch.__version__ < (2, 12):
        # Otherwise requires_grad of an unchanged module's parameters is not checked: the training pass would use the
        # graph of the frozen pass, and the heads would never learn (pytorch/pytorch#177158).
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False

    def compiled(function: Callable) -> Callable:
        return _static_but_for_batch(torch.compile(function, fullgraph=True, backend=backend))

    units = units_of(module)
    for unit in units or [module]:
        # Not unit.compile(), which also traces hooks: FSDP2's break the graph if forward is defined by PyTorch's own
        # classes (nn.Sequential).
        if not isinstance(unit, Network) or unit.compiles:
            unit.forward = compiled(unit.forward)
    for method in module.compiled_methods() if isinstance(module, Network) and units else ():
        if not any(part._forward_hooks for part in method.__self__.modules()):
            setattr(method.__self__, method.__name__, compiled(method))


def _static_but_for_batch(compiled: Callable) -> Callable:
    @functools.wraps(compiled)
    def forward(*inputs: Any, **options: Any) -> Any:
        for x in (*inputs, *options.values()):
            if isinstance(x, Tensor):
                for dim in range(1, x.dim()):
                    torch._dynamo.mark_static(x, dim)
        return compiled(*inputs, **options)

    return forward
