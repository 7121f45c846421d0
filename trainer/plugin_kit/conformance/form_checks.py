"""Checks shared by encoders, tokenizers, denoisers and losses."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.distributed.materialize import InitError, materialize
from components.distributed.parallel import Sharding, compile_units, local, make_mesh, shard
from trainer.plugin_kit.conformance.form import Form, Outputs, detached, distance, named
from trainer.plugin_kit.conformance.subject import Fault, Subject

SHOWN = 5


def bound(form: Form, *functions: Callable[[Form], None]) -> list[Callable[[Subject], None]]:
    """Bind checks that take a form to ``form``, so that they can be called with a subject."""

    def bind(function: Callable[[Form], None]) -> Callable[[Subject], None]:
        @functools.wraps(function)
        def run(subject: Subject) -> None:
            function(form)

        return run

    return [bind(function) for function in functions]


def repeats_itself(form: Form) -> None:
    """The same inputs produce the same outputs, and no random numbers are drawn."""
    part, inputs = form.part(), form.inputs(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = detached(form.call(part, inputs))
        drew = not torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(2)
        second = detached(form.call(part, inputs))
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    if drew or changed:
        how = f"{', '.join(changed)} differ" if changed else "torch's global generator advanced"
        raise Fault(
            f"two calls with the same inputs: {how}. The plugin draws random numbers (dropout?) or keeps state between "
            "calls; all random numbers of a step are passed to the recipe as draws"
        )


def treats_images_one_by_one(form: Form) -> None:
    """The outputs of an image do not depend on the other images of the batch."""
    if not form.per_image:
        return
    two, three = form.expected, detached(form.call(form.part(), form.inputs(3)))
    for name, value in two.items():
        if value.dim() and distance(three[name][:2], value) > 1e-3:
            raise Fault(
                f"{name} of an image depends on the other images of the batch (batch norm, or a reshape that mixes the "
                "first two dimensions?)"
            )


def keeps_fp64(form: Form) -> None:
    """With training.precision = "fp64", outputs are fp64 and match fp32 up to rounding."""
    part = form.part()
    if isinstance(part, nn.Module):
        part.double()
    outputs = form.call(part, tuple(x.double() if x.is_floating_point() else x for x in form.inputs(2)))
    for name, value in outputs.items():
        if value.dtype != torch.float64:
            raise Fault(
                f"{name} is {_short(value.dtype)} in an fp64 run; replace .float() or dtype=torch.float32 by "
                "components.nn.precision.at_least_fp32, which keeps fp64"
            )
        if not (far := distance(value, form.expected[name])) < 1e-2:
            raise Fault(f"{name} in fp64 differs from fp32 by {far:.1e} (relative); does the code depend on the dtype?")


def keeps_its_head_in_bf16(form: Form) -> None:
    """Under bf16 autocast, outputs are bf16 or fp32 and close to fp32; losses and posteriors are fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = detached(form.call(form.part(), form.inputs(2)))
    for name, value in outputs.items():
        allowed = (torch.float32,) if name in form.at_least_fp32 else (torch.float32, torch.bfloat16)
        if value.dtype not in allowed:
            raise Fault(
                f"{name} is {_short(value.dtype)} under bf16 autocast; expected "
                f"{' or '.join(map(_short, allowed))}: compute it from components.nn.precision.at_least_fp32(input)"
            )
        if not (far := distance(value, form.expected[name])) < 0.15:
            raise Fault(
                f"{name} under bf16 autocast differs from fp32 by {far:.2f} (relative); compute the sensitive part "
                "inside components.nn.precision.no_autocast"
            )


def saves_and_loads(form: Form) -> None:
    """Another instance that loads the saved state dict produces the same outputs."""
    part = form.part()
    if not isinstance(part, nn.Module):
        return
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    with named("its state dict contains more than plain tensors (torch.load with weights_only=True fails)"):
        state = torch.load(file, weights_only=True)
    other = form.prepared(1)
    with named("its state dict does not load into another instance"):
        other.load_state_dict(state)
    found = detached(form.call(other, form.inputs(2)))
    changed = [name for name, value in form.expected.items() if not torch.equal(found[name], value)]
    if changed:
        raise Fault(
            f"another instance with the same state dict returns different {', '.join(changed)}: a random value from "
            "__init__ is neither a parameter nor a persistent buffer, so a resumed run would lose it"
        )


def can_be_made_without_memory(form: Form) -> None:
    """The module can be constructed on the meta device, and init_weights(), if any, then fills every tensor."""
    with named("cannot be made on torch.device('meta'), on which every config is checked first"), torch.device("meta"):
        part = form.make(0)
    if not isinstance(part, nn.Module) or not hasattr(part, "init_weights"):
        return
    held = [*part.named_parameters(), *part.named_buffers()]
    if real := [name for name, t in held if not t.is_meta]:
        raise Fault(
            f"constructed on the meta device, but {_some(real)} are on another device; create tensors in __init__ "
            "without device=... and not from numpy arrays"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            materialize(part, torch.device("cpu"))
        except InitError as error:
            raise Fault(str(error)) from error
    usual, other = (dict(form.make(seed).named_buffers()) for seed in (0, 1))
    constant = [name for name, t in usual.items() if torch.equal(t, other[name])]
    lost = [name for name, t in part.named_buffers() if name in constant and not torch.equal(t, usual[name])]
    if lost:
        raise Fault(
            f"{type(part).__name__}.init_weights() sets {_some(lost)} to other values than __init__; for a module "
            "constructed on the meta device, init_weights() must fill every buffer"
        )


def has_sound_units(form: Form) -> None:
    """units() are distinct, non-nested sub-modules, each used only through its forward."""
    part = form.part()
    if not isinstance(part, nn.Module) or not hasattr(part, "units"):
        return
    units = list(part.units())
    inside = {module: name for name, module in part.named_modules()}
    for number, unit in enumerate(units):
        if not isinstance(unit, nn.Module) or unit not in inside:
            raise Fault(f"units()[{number}] ({type(unit).__name__}) is not a sub-module of the plugin")
    names = [inside[unit] for unit in units]
    for name, unit in zip(names, units):
        if names.count(name) > 1 or any(m in units for m in unit.modules() if m is not unit):
            raise Fault(f"units() contains {name} twice, or also contains one of its sub-modules")
    called: set[str] = set()
    for name, unit in zip(names, units):
        unit.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    outputs = form.call(part, form.inputs(2))
    _backward(outputs)
    for name, unit in zip(names, units):
        used = any(p.grad is not None for p in unit.parameters())
        if used and name not in called:
            raise Fault(
                f"units() contains {name}, whose weights are used, but not through its forward: FSDP2 would not gather "
                "them, and torch.compile would not compile them"
            )


def compiles_in_one_graph(form: Form) -> None:
    """torch.compile compiles each unit (or the whole module) without graph breaks, with the same outputs."""
    part = form.part()
    if not isinstance(part, nn.Module) or not any(True for _ in part.parameters()):
        return
    torch._dynamo.reset()
    try:
        compile_units(part, backend="eager")
        with _reason("a unit cannot be compiled in one graph (training.compile = true)"):
            found = detached(form.call(part, form.inputs(2)))
    finally:
        torch._dynamo.reset()
    for name, value in form.expected.items():
        if distance(found[name], value) > 1e-3:
            raise Fault(f"{name} when compiled differs from eager by {distance(found[name], value):.1e} (relative)")


def shards_with_fsdp2(form: Form) -> None:
    """Sharded with FSDP2, the module has the same outputs and gradients as unsharded."""
    whole, part = form.part(), form.part()
    if not isinstance(part, nn.Module) or not any(True for _ in part.parameters()):
        return
    alone = form.call(whole, form.inputs(2))
    with _one_rank(), named("fails under FSDP2 (weights used outside the forward of a unit or of the module?)"):
        shard(part, Sharding(make_mesh("cpu", (1, 1))), form.methods, form.learns)
        outputs = form.call(part, form.inputs(2))
        for name, value in alone.items():
            if (far := distance(outputs[name].detach(), value.detach())) > 1e-4:
                raise Fault(f"{name} under FSDP2 differs from the unsharded output by {far:.1e} (relative)")
        if not form.learns:
            return
        _backward(alone)
        _backward(outputs)
        gradients = dict(whole.named_parameters())
        for name, p in part.named_parameters():
            own = gradients[name].grad
            if own is not None and (p.grad is None or distance(local(p.grad), own) > 1e-3):
                raise Fault(f"the gradient of {name} under FSDP2 differs from the unsharded one")


def learns_with_all_of_it(form: Form) -> None:
    """Every trainable weight gets a finite gradient."""
    part = form.part()
    if not isinstance(part, nn.Module):
        return
    trained = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    if not trained:
        return
    outputs = form.call(part, form.inputs(2))
    if not any(value.requires_grad for value in outputs.values()):
        raise Fault("has trainable weights, but no output carries a gradient (torch.no_grad() or detach()?)")
    _backward(outputs)
    if unreached := [name for name, p in trained if p.grad is None]:
        raise Fault(f"trainable, but no output depends on: {_some(unreached)}; use them or make them buffers")
    if broken := [name for name, p in trained if not p.grad.isfinite().all()]:
        raise Fault(f"the gradient is not finite for: {_some(broken)}")


COMPUTES = (
    repeats_itself,
    treats_images_one_by_one,
    keeps_fp64,
    keeps_its_head_in_bf16,
    saves_and_loads,
    can_be_made_without_memory,
    has_sound_units,
    compiles_in_one_graph,
    shards_with_fsdp2,
)


def _backward(outputs: Outputs) -> None:
    total = [
        value.double().square().mean() + value.double().mean() for value in outputs.values() if value.requires_grad
    ]
    if total:
        torch.stack(total).sum().backward()


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Context manager that initializes a single-process group, unless one exists."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _reason(what: str) -> Iterator[None]:
    """Like :func:`named`, and adds the source line that the compiler reports."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        places = [line for line in lines if line.startswith("File ")]
        raise Fault(f"{what}: {lines[0] if lines else error}{f' ({places[-1]})' if places else ''}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scalar(value: Tensor, name: str) -> None:
    """Raise :class:`Fault` unless ``value`` is a finite scalar tensor."""
    if not isinstance(value, Tensor) or value.dim():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Fault(f"{name} must be a scalar tensor, but is {shape}; take the mean")
    if not value.isfinite():
        raise Fault(f"{name} is {value.item()}")
