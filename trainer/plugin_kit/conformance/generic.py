"""Checks shared by encoders, tokenizers, denoisers and losses: what a network computes, stores, compiles and shards."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from components.distributed.materialize import InitError, materialize
from components.distributed.parallel import Sharding, compile_units, local, make_mesh, shard
from trainer.plugin_kit.conformance.adapter import Adapter, Outputs, distance, failing
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind

SHOWN = 5


def is_frozen(adapter: Adapter) -> None:
    """No weight is trainable, outputs carry no gradient, and a forward pass changes no buffer."""
    part = adapter.part()
    if trainable := [name for name, p in part.named_parameters() if p.requires_grad]:
        raise Failure(
            f"{_some(trainable)}: trainable, but has no optimizer; end __init__ with self.requires_grad_(False).eval()"
        )
    before = {name: buffer.clone() for name, buffer in part.named_buffers()}
    if any(value.requires_grad for value in adapter.call(part, adapter.inputs(2)).values()):
        raise Failure("its outputs carry a gradient; decorate forward with @torch.no_grad()")
    if changed := [name for name, buffer in part.named_buffers() if not torch.equal(buffer, before[name])]:
        raise Failure(f"a forward pass changes the buffer {changed[0]}; a frozen module must not update statistics")


def is_deterministic(adapter: Adapter) -> None:
    """The same inputs and buffers produce the same outputs, and no random numbers are drawn."""
    part = adapter.part()
    buffers = {name: buffer.clone() for name, buffer in part.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = adapter.outputs(part)
        drew = not torch.equal(before, torch.random.get_rng_state())
        for name, buffer in part.named_buffers():  # of a part that learns, they may be state between steps
            buffer.copy_(buffers[name])
        torch.manual_seed(2)
        second = adapter.outputs(part)
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    if drew or changed:
        how = f"{', '.join(changed)} differ" if changed else "torch's global generator advanced"
        raise Failure(
            f"two calls with the same inputs: {how}. The plugin draws random numbers (dropout?) or keeps state between "
            "calls outside of buffers; all random numbers of a step are declared by the recipe, and by an adversarial "
            "loss in random_numbers"
        )


def images_are_independent(adapter: Adapter) -> None:
    """The outputs of an image do not depend on the other images of the batch."""
    three = adapter.outputs(adapter.part(), 3)
    for name, value in adapter.expected.items():
        if value.dim() and distance(three[name][:2], value) > 1e-3:
            raise Failure(
                f"{name} of an image depends on the other images of the batch (batch norm, or a reshape that mixes the "
                "first two dimensions?)"
            )


def keeps_fp64(adapter: Adapter) -> None:
    """With training.precision = "fp64", outputs are fp64 and match fp32 up to rounding."""
    part = adapter.part().double()
    outputs = adapter.call(part, tree_map(_double, adapter.inputs(2)))
    for name, value in outputs.items():
        if value.dtype != torch.float64:
            raise Failure(
                f"{name} is {_short(value.dtype)} in an fp64 run; replace .float() or dtype=torch.float32 by "
                "components.nn.precision.at_least_fp32, which keeps fp64"
            )
    _compare(outputs, adapter.expected, 1e-2, "in fp64 and fp32 differ", "does the code depend on the dtype?")


def works_in_bf16(adapter: Adapter) -> None:
    """Under bf16 autocast, outputs are bf16 or fp32 and close to fp32; losses and posteriors are fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = adapter.outputs(adapter.part())
    for name, value in outputs.items():
        allowed = {torch.float32} | ({torch.bfloat16} if name.startswith(adapter.may_be_bf16) else set())
        if value.dtype not in allowed:
            raise Failure(
                f"{name} is {_short(value.dtype)} under bf16 autocast; expected "
                f"{' or '.join(map(_short, allowed))}: compute it from components.nn.precision.at_least_fp32(input)"
            )
    remedy = "compute the sensitive part inside components.nn.precision.no_autocast"
    _compare(outputs, adapter.expected, 0.15, "under bf16 autocast and in fp32 differ", remedy)


def saves_and_loads(adapter: Adapter) -> None:
    """Another instance that loads the saved state dict produces the same outputs."""
    part = adapter.part()
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    with failing("its state dict contains more than plain tensors (torch.load with weights_only=True fails)"):
        state = torch.load(file, weights_only=True)
    other = adapter.prepare(1)
    with failing("its state dict does not load into another instance"):
        other.load_state_dict(state)
    found = adapter.outputs(other)
    changed = [name for name, value in adapter.expected.items() if not torch.equal(found[name], value)]
    if changed:
        raise Failure(
            f"another instance with the same state dict returns different {', '.join(changed)}: a random value from "
            "__init__ is neither a parameter nor a persistent buffer, so a resumed run would lose it"
        )


def builds_on_the_meta_device(adapter: Adapter) -> None:
    """The module can be constructed on the meta device, and init_weights(), if any, then fills every tensor."""
    with (
        failing("cannot be made on torch.device('meta'), on which every config is checked first"),
        torch.device("meta"),
    ):
        part = adapter.make(0)
    if not part.initializes_itself():
        return
    held = [*part.named_parameters(), *part.named_buffers()]
    if real := [name for name, t in held if not t.is_meta]:
        raise Failure(
            f"constructed on the meta device, but {_some(real)} are on another device; create tensors in __init__ "
            "without device=... and not from numpy arrays"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            materialize(part, torch.device("cpu"))
        except InitError as error:
            raise Failure(str(error)) from error
    usual, other = (dict(adapter.make(seed).named_buffers()) for seed in (0, 1))
    constant = [name for name, t in usual.items() if torch.equal(t, other[name])]
    lost = [name for name, t in part.named_buffers() if name in constant and not torch.equal(t, usual[name])]
    if lost:
        raise Failure(
            f"{type(part).__name__}.init_weights() sets {_some(lost)} to other values than __init__; for a module "
            "constructed on the meta device, init_weights() must fill every buffer"
        )


def has_valid_units(adapter: Adapter) -> None:
    """units() are distinct, non-nested sub-modules."""
    part = adapter.part()
    units = list(part.units())
    inside = {module: name for name, module in part.named_modules()}
    for number, unit in enumerate(units):
        if not isinstance(unit, nn.Module) or unit not in inside:
            raise Failure(f"units()[{number}] ({type(unit).__name__}) is not a sub-module of the plugin")
    names = [inside[unit] for unit in units]
    for name, unit in zip(names, units):
        if names.count(name) > 1 or any(m in units for m in unit.modules() if m is not unit):
            raise Failure(f"units() contains {name} twice, or also contains one of its sub-modules")


def compiles_in_one_graph(adapter: Adapter) -> None:
    """torch.compile compiles each unit (or the whole module) without graph breaks, with the same outputs."""
    part = adapter.part()
    torch._dynamo.reset()
    try:
        compile_units(part, backend="eager")
        with failing("a unit cannot be compiled in one graph (training.compile = true)"):
            found = adapter.outputs(part)
    finally:
        torch._dynamo.reset()
    _compare(found, adapter.expected, 1e-3, "compiled and eager differ")


def shards_with_fsdp2(adapter: Adapter) -> None:
    """Sharded with FSDP2, the network has the same outputs and gradients: weights are used through forward only."""
    whole, part = adapter.part(), adapter.part()
    alone = adapter.call(whole, adapter.inputs(2))
    with one_rank(), failing("fails under FSDP2 (weights used outside the forward of a unit or of the module?)"):
        shard(part, Sharding(make_mesh("cpu", (1, 1))), adapter.learns)
        outputs = adapter.call(part, adapter.inputs(2))
        _compare(outputs, alone, 1e-4, "under FSDP2 and unsharded differ")
        if not adapter.learns:
            return
        _backward(alone)
        _backward(outputs)
        gradients = dict(whole.named_parameters())
        for name, p in part.named_parameters():
            own = gradients[name].grad
            if own is not None and (p.grad is None or distance(local(p.grad), own) > 1e-3):
                raise Failure(f"the gradient of {name} under FSDP2 differs from the unsharded one")


def every_weight_gets_a_gradient(adapter: Adapter) -> None:
    """Every trainable weight gets a finite gradient."""
    part = adapter.part()
    trained = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    if not trained:
        return
    outputs = adapter.call(part, adapter.inputs(2))
    if not any(value.requires_grad for value in outputs.values()):
        raise Failure("has trainable weights, but no output carries a gradient (torch.no_grad() or detach()?)")
    _backward(outputs)
    if unreached := [name for name, p in trained if p.grad is None]:
        raise Failure(f"trainable, but no output depends on: {_some(unreached)}; use them or make them buffers")
    if broken := [name for name, p in trained if not p.grad.isfinite().all()]:
        raise Failure(f"the gradient is not finite for: {_some(broken)}")


FOR_ALL = (
    is_deterministic,
    images_are_independent,
    keeps_fp64,
    works_in_bf16,
    builds_on_the_meta_device,
    saves_and_loads,
    has_valid_units,
)
FOR_WEIGHTS = (compiles_in_one_graph, shards_with_fsdp2)


def checks(case: Case, adapter: Adapter, *own: Callable[[Adapter], None]) -> list[Check]:
    """Return the checks ``own`` of a kind, those of all networks, and those of networks with weights."""
    has_weights = any(True for _ in adapter.part().parameters())
    return bind(case, adapter, *own, *FOR_ALL, *(FOR_WEIGHTS if has_weights else ()))


def _compare(found: Outputs, expected: Outputs, limit: float, how: str, remedy: str = "") -> None:
    for name, value in expected.items():
        if not (far := distance(found[name].detach(), value.detach())) < limit:
            raise Failure(f"{name} {how} by {far:.1e} (relative){remedy and '; '}{remedy}")


def _backward(outputs: Outputs) -> None:
    values = [value.double() for value in outputs.values() if value.requires_grad]
    if values:
        torch.stack([value.square().mean() + value.mean() for value in values]).sum().backward()


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Context manager that initializes a single-process group, unless one exists."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
