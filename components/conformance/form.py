"""A plugin that computes, in the one form that the checks of all kinds share."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.conformance.subject import Fault
from components.diffusion.draws import generator

Outputs = dict[str, Tensor]
Inputs = tuple[Tensor, ...]


@dataclass(eq=False)
class Form:
    """How a part is made, fed and called.

    Attributes:
        make: a new part with random weights from a seed.
        inputs: of so many images, fp32, always the same.
        call: every output by name; those whose first dimension is the batch are compared image by image.
        methods: methods besides ``forward`` that the trainer calls.
        learns: whether a recipe may train it.
        at_least_fp32: outputs that must not be rounded to bf16 under autocast.
        per_image: outputs of one image do not depend on the others.
    """

    make: Callable[[int], Any]
    inputs: Callable[[int], Inputs]
    call: Callable[[Any, Inputs], Outputs]
    methods: tuple[str, ...] = ()
    learns: bool = True
    at_least_fp32: tuple[str, ...] = ()
    per_image: bool = True

    @functools.cached_property
    def made(self) -> Any:
        return self.prepared(0)

    def prepared(self, seed: int) -> Any:
        """A part as training has it; zero weights made random, so that everything behind them matters."""
        part = self.make(seed)
        if isinstance(part, nn.Module):
            part.train(self.learns)
            stir(part)
        return part

    def part(self) -> Any:
        """A copy of the first part, to change at will."""
        return copy.deepcopy(self.made)

    @functools.cached_property
    def expected(self) -> Outputs:
        """What the first part makes of two images."""
        return detached(self.call(self.part(), self.inputs(2)))


@torch.no_grad()
def stir(module: nn.Module) -> None:
    for index, p in enumerate(module.parameters()):
        if not p.is_meta and not p.any():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator("stir", index)).to(p.dtype))


def images(count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [-1, 1]; the first images are the same whatever the count."""
    return torch.stack([torch.rand(3, side, side, generator=generator("image", i)) * 2 - 1 for i in range(count)])


def normal(name: str, count: int, *shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=generator(name, i)) for i in range(count)])


def detached(outputs: Outputs) -> Outputs:
    return {name: value.detach().clone() for name, value in outputs.items()}


def shapes(outputs: Outputs, expected: dict[str, tuple[int, ...]], case: str) -> None:
    """Compares shapes and asks for finite floating-point numbers; raises :class:`Fault` that names the case."""
    for name, shape in expected.items():
        value = outputs[name]
        if not isinstance(value, Tensor):
            raise Fault(f"{name} is a {type(value).__name__} for {case}; expected a tensor of shape {shape}")
        if tuple(value.shape) != shape:
            raise Fault(f"{name} has shape {tuple(value.shape)} for {case}; expected {shape}")
        if not value.isfinite().all():
            raise Fault(f"{name} is not finite for {case}")


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the size of ``b``; for a scalar, to 1 if that is more."""
    difference = (a.double() - b.double()).norm().item()
    size = b.double().norm().item()
    return difference / max(size, 1.0 if b.dim() == 0 else 1e-12)


def reaches(value: Tensor, source: Tensor) -> bool:
    """Whether a gradient of ``value`` reaches ``source``, finite and not zero."""
    if not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value, source, allow_unused=True, retain_graph=True)
    return gradient is not None and bool(gradient.any()) and bool(gradient.isfinite().all())


def attribute(part: Any, name: str, kind: type | tuple[type, ...], meaning: str) -> Any:
    """An attribute that the contract names."""
    if not hasattr(part, name):
        raise Fault(f"has no attribute {name}: {meaning}")
    value = getattr(part, name)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise Fault(f"{name} = {value!r} is a {type(value).__name__}; expected {wanted}: {meaning}")
    return value


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Errors inside become a :class:`Fault` that begins with ``what``."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        raise Fault(f"{what}: {type(error).__name__}: {first}") from error
