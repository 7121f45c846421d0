"""Checks of optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from components.checkpoint import load_optimizer_state, optimizer_state
from components.contracts import Network, Optimizer
from components.distributed.parallel import Sharding, local, make_mesh, shard
from trainer.config.schema import OptimizerTable
from trainer.plugin_kit.conformance.adapter import failing
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind
from trainer.plugin_kit.conformance.generic import one_rank

LR = 0.01


def checks(case: Case) -> list[Check]:
    case.make()
    return bind(
        case,
        case,
        options_differ_from_the_common_keys,
        trains_every_parameter,
        takes_the_learning_rate_of_the_schedule,
        keeps_everything_in_a_skipped_step,
        does_not_wait_for_the_device,
        can_be_resumed,
        keeps_fp64,
        works_on_shards,
    )


class _Net(Network):
    """Blocks with a wide and a tall matrix, a norm, an embedding, a convolution and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)) for _ in "ab")
        self.convolution = nn.Conv2d(2, 3, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def units(self) -> list[nn.Module]:
        return list(self.blocks)


class Run:
    """An optimizer with the network that it trains on gradients that depend on the step alone."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, sharded: bool = False) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.modules = nn.ModuleDict({"net": _Net().to(dtype)})
        self.names = [name for name, p in self.modules.named_parameters() if p.requires_grad]
        if sharded:
            shard(self.modules["net"], Sharding(make_mesh("cpu", (1, 1))))
        self.optimizer: Optimizer = case.make(modules=self.modules, lr=LR)

    def step(self, step: int, value: float | None = None, found_inf: float | None = 0.0) -> None:
        """Take a step with random gradients, or with ``value`` everywhere."""
        generator = torch.Generator().manual_seed(step)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            local(p.grad).copy_(gradient if value is None else torch.full_like(gradient, value))
        self.optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.modules.parameters() if p.requires_grad)

    def weights(self) -> dict[str, Tensor]:
        return {name: local(p).detach().clone() for name, p in zip(self.names, self.parameters())}

    def state(self) -> dict[str, Tensor]:
        """Tensors of the state by parameter and key."""
        return {
            f"{name}.{key}": local(value).clone()
            for name, p in zip(self.names, self.parameters())
            for key, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        }


def options_differ_from_the_common_keys(case: Case) -> None:
    """No option has the name of a key that [optimizer] has for every optimizer."""
    if taken := sorted(case.plugin.options.keys() & OptimizerTable.model_fields.keys()):
        raise Failure(f"the options {', '.join(taken)} are keys of [optimizer], which the trainer reads; rename them")


def trains_every_parameter(case: Case) -> None:
    """A step changes every parameter that has a gradient, and no others."""
    run = Run(case)
    before, frozen = run.weights(), run.modules["net"].frozen.clone()
    run.optimizer.step()
    _same(run.weights(), before, "changes without a gradient")
    run.step(0, found_inf=None)
    if still := [name for name, value in run.weights().items() if torch.equal(value, before[name])]:
        raise Failure(f"a step does not change {', '.join(still)}; add every trained parameter to param_groups")
    if not torch.equal(frozen, run.modules["net"].frozen):
        raise Failure("changes a parameter that does not require gradients; use trained_parameters(modules)")


def takes_the_learning_rate_of_the_schedule(case: Case) -> None:
    """Every param group has an ``lr``, and with 0 there, a step changes no weight."""
    run = Run(case)
    if [group for group in run.optimizer.param_groups if not isinstance(group.get("lr"), float)]:
        raise Failure("a param group has no 'lr' of type float; pass lr to torch.optim.Optimizer.__init__")
    run.step(0)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = run.weights()
    run.step(1)
    _same(run.weights(), before, "changes with a learning rate of 0; read group['lr'] in every step")


def keeps_everything_in_a_skipped_step(case: Case) -> None:
    """With ``found_inf`` = 1, weights and state stay as they are, also if gradients are NaN; with 0, all is applied."""
    run, other = Run(case), Run(case)
    before = run.weights()
    run.step(0, torch.nan, found_inf=1.0)
    _same(run.weights(), before, "changes in a skipped step; where found_inf is 1, keep the old value")
    if kept := [key for key, value in run.state().items() if value.any()]:
        raise Failure(f"the state {kept[0]} is not zero after a skipped first step")
    run.step(1)
    other.step(1, found_inf=None)
    _same(run.weights(), other.weights(), "differs between found_inf = 0 and found_inf = None")
    before, state = run.weights(), run.state()
    for value in (None, torch.nan):
        run.step(2, value, found_inf=1.0)
        _same(run.weights(), before, "changes in a skipped step; where found_inf is 1, keep the old value")
        _same(run.state(), state, "(state) changes in a skipped step; where found_inf is 1, keep the old value")


def does_not_wait_for_the_device(case: Case) -> None:
    """A step reads no value of a tensor, which would wait for the GPU."""
    run = Run(case)
    run.step(0)
    how = "a step waits for the device (.item(), float(), bool(), if tensor:); use torch.where"
    with failing(how), _NoReading():
        run.step(1)


def can_be_resumed(case: Case) -> None:
    """A run that continues from its saved state takes the same steps; all state is in ``optimizer.state``."""
    run, resumed = Run(case), Run(case)
    for step in range(2):
        run.step(step)
    resumed.modules.load_state_dict(run.modules.state_dict())
    saved = copy.deepcopy(optimizer_state(run.modules, run.optimizer))
    load_optimizer_state(resumed.modules, resumed.optimizer, saved)
    for each in (run, resumed):
        each.step(2)
    _same(resumed.weights(), run.weights(), "differs after a resume; keep all tensors in self.state[parameter]")


def keeps_fp64(case: Case) -> None:
    """Weights and state of fp64 weights are fp64."""
    run = Run(case, torch.float64)
    run.step(0)
    sizes = {name: value.shape for name, value in run.weights().items()}
    for key, value in {**run.weights(), **run.state()}.items():
        if value.dtype != torch.float64 and value.shape in sizes.values():
            raise Failure(f"{key} is {value.dtype} for fp64 weights; use torch.zeros_like(parameter)")


def works_on_shards(case: Case) -> None:
    """On weights sharded by FSDP2, steps are the same, and state of the weights' shape is sharded like them."""
    whole = Run(case, torch.float64)
    with one_rank(), failing("fails under FSDP2"):
        sharded = Run(case, torch.float64, sharded=True)
        for run in (whole, sharded):
            for step in range(2):
                run.step(step)
        for (name, mine), theirs in zip(sharded.weights().items(), whole.weights().values()):
            if not torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12):
                raise Failure(f"{name} differs under FSDP2; use the whole matrix (components.optim.whole_matrices)")
        for p in sharded.parameters():
            for key, value in sharded.optimizer.state[p].items():
                if isinstance(value, Tensor) and value.shape == p.shape and type(value) is not type(p.data):
                    raise Failure(f"the state {key} is not sharded like its parameter; use torch.zeros_like(parameter)")


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read")
        return func(*args, **(kwargs or {}))


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], how: str) -> None:
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise Failure(f"{name} {how}")
