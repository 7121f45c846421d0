"""The process's place among the ranks, how modules are spread over them, and what ranks do together.

Data parallelism is FSDP2 on a mesh of (replicate, shard) ranks whatever the strategy: ``fsdp`` is (1, n), ``ddp``
(n, 1), ``hsdp`` anything between. One code path then holds for all of them, with gradients reduced while the
backward pass runs, and with the frozen passes and the methods beside ``forward`` that DistributedDataParallel lacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
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

Strategy = Literal["fsdp", "hsdp", "ddp", "none"]


class ParallelError(Exception):
    """The ranks cannot be arranged as asked, or one of them is lost; the message says what to do."""


@dataclass(frozen=True)
class World:
    """One process of a run.

    Attributes:
        rank: in [0, size).
        size: number of processes.
        device: where this one computes.
        local_size: processes on this machine.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(timeout_s: float = 600.0) -> World:
    """Reads torchrun's environment and joins the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout_s: seconds after which a rank that waits for a lost one gives up.
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
    """Inside, an error of the communication with other ranks becomes a :class:`ParallelError` that says what it means.

    Args:
        where: tells how far this rank has come.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors.
        text = str(error)
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", text):
            raise
        raise ParallelError(
            f"this rank lost another one {where()} ({text.splitlines()[0][:200]}). The rank that failed says why in "
            "its own output (LOG_RANK shows others than 0). All ranks end; the same command goes on from the newest "
            "checkpoint, and MAX_RESTARTS=n lets run_train.sh do so by itself"
        ) from error


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Sharding:
    """How modules are spread over the ranks.

    Attributes:
        mesh: (replicate, shard); a module is cut into ``shard`` parts, and each part lives on ``replicate`` ranks.
        param_dtype: what whole weights are gathered and used in (bf16), or None: their own. The parts, the
            gradients' reduction and the optimizer stay in fp32.
        reshard_after_forward: free a unit's whole weights between its forward and backward pass: memory for one
            more gathering.
        cpu_offload: parts, gradients and optimizer states live on the host.
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
    """(replicate, shard) of a strategy.

    Args:
        strategy: see :class:`Sharding`.
        world_size: ranks.
        shard: for hsdp: ranks that share one copy of the weights.

    Raises:
        ParallelError: ``none`` with several ranks; hsdp whose ``shard`` does not divide the ranks.
    """
    if strategy == "none" and world_size > 1:
        raise ParallelError(
            f"parallel.strategy = 'none' trains on one process, but there are {world_size}; choose fsdp, hsdp or ddp, "
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
    """The (replicate, shard) mesh; neighbouring ranks, which share a machine, share a copy of the weights."""
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, sharding: Sharding, methods: Sequence[str] = (), learns: bool = True) -> None:
    """Spreads a module's parameters over the ranks, each of ``units()`` by itself, then the rest.

    Gradients become means over all ranks. Buffers stay whole on every rank: whoever changes them must do it alike.

    Args:
        module: on any device, the meta device included. ``keep_fp32 = True`` on it (or on a unit) says that it
            computes in fp32 whatever the precision of the run.
        sharding: where and how.
        methods: methods other than ``forward`` that use the parameters.
        learns: a backward pass follows its forward passes, and frees what they gathered.
    """
    units = list(module.units()) if hasattr(module, "units") else []
    for unit in units:
        _fully_shard(unit, sharding, sharding.reshard_after_forward, _keeps_fp32(module, unit))
    covered = {p for unit in units for p in unit.parameters()}
    if any(p not in covered for p in module.parameters()):
        # The root's last weights are needed first by the backward pass: freeing them would gain nothing. Without a
        # backward pass they would stay for ever, and be used when the parts have long changed.
        _fully_shard(module, sharding, not learns, _keeps_fp32(module))
        for method in methods:
            register_fsdp_forward_method(module, method)
        # A posterior's mean is half of a tensor; nobody writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _fully_shard(module: nn.Module, sharding: Sharding, reshard: bool, keep_fp32: bool) -> None:
    dtype = None if keep_fp32 else sharding.param_dtype
    # Inputs stay as they are: times t would be rounded to bf16, and autocast casts what may be cast.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None,
                                  cast_forward_inputs=False)  # fmt: skip
    pinned = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pinned) if sharding.cpu_offload else OffloadPolicy()
    # Where every rank holds the whole, freeing saves little, and gathering is a copy.
    reshard = reshard and sharding.shape[1] > 1
    # A second dimension costs another reduction per unit, and DTensor tries the square of an operator's placements.
    mesh = sharding.mesh if sharding.shape[0] > 1 else sharding.mesh["shard"]
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)


def _keeps_fp32(*modules: nn.Module) -> bool:
    return any(getattr(module, "keep_fp32", False) for module in modules)


def sharded_parts(*modules: nn.Module) -> Iterator[FSDPModule]:
    """The modules inside (themselves included) that :func:`shard` wrapped."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                yield part


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of every rank's tensor, on every rank; asynchronous to the host on a GPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def gather_floats(*values: float) -> list[list[float]]:
    """Every rank's values, on every rank, from the host."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(values)]
    found = [torch.empty(len(values), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor(values, dtype=torch.float64))
    return [x.tolist() for x in found]


def gather_rows(rows: Tensor) -> Tensor:
    """Every rank's rows, in the order of the ranks, on every rank; as many on each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(found, rows.contiguous())
    return torch.cat(found)


def reshard(*modules: nn.Module) -> None:
    """Frees weights that forward passes without a backward pass have gathered, so that they are gathered anew."""
    for part in sharded_parts(*modules):
        part.reshard()


def settle(*modules: nn.Module) -> None:
    """Lets FSDP2 look at parameters while they learn: torch 2.11 keeps the gradient dtypes that it finds first."""
    for part in sharded_parts(*modules):  # a root comes before its units
        part._get_fsdp_state()._lazy_init()  # returns at once after the first call


def compile_units(module: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compiles each part of ``module.units()``, or the module itself; compile time does not grow with depth.

    Every size but the first of each input, the batch, is static: stages of one class share their code, and the
    compiler would else make the sides of all but the first stage's maps symbolic (slower kernels, no layout chosen for
    convolutions, on some torch versions a crash).
    """
    # Graphs are counted by code: a tokenizer's stages share theirs, each of another shape, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if torch.__version__ < (2, 12):
        # It would skip the check of requires_grad on the parameters of an unchanged module: the graph of the frozen
        # pass would serve the training pass, and the heads never learn (pytorch/pytorch#177158).
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    for unit in module.units() if hasattr(module, "units") else [module]:
        # Not unit.compile(), which takes the hooks in, too: FSDP2's break the graph wherever PyTorch's own classes
        # (nn.Sequential) define forward.
        unit.forward = _static_but_for_batch(torch.compile(unit.forward, fullgraph=True, backend=backend))


def _static_but_for_batch(compiled: Callable) -> Callable:
    @functools.wraps(compiled)
    def forward(*inputs: Any, **options: Any) -> Any:
        for x in (*inputs, *options.values()):
            if isinstance(x, Tensor):
                for dim in range(1, x.dim()):
                    torch._dynamo.mark_static(x, dim)
        return compiled(*inputs, **options)

    return forward
