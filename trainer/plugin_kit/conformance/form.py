"""Adapter that lets generic checks construct, feed and call plugins of any kind."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.diffusion.random_numbers import generator
from trainer.plugin_kit.conformance.subject import Fault

Outputs = dict[str, Tensor]
Inputs = tuple[Tensor, ...]


@dataclass(eq=False)
class Form:
    """How to construct, feed and call a plugin.

    Attributes:
        make: constructs an instance with random weights from a seed.
        inputs: returns fp32 inputs for a number of images, the same at every call.
        call: returns all outputs by name; tensors whose first dimension is the batch are compared image by image.
        methods: methods besides ``forward`` that the trainer calls.
        learns: whether a recipe may train it.
        at_least_fp32: names of outputs that must not be bf16 under autocast.
        per_image: whether outputs of an image must not depend on the other images of the batch.
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
        """Return an instance in training's mode, with all-zero weights randomized so that no path is inactive."""
        part = self.make(seed)
        if isinstance(part, nn.Module):
            part.train(self.learns)
            stir(part)
        return part

    def part(self) -> Any:
        """Return a copy of the first instance, which the caller may change."""
        return copy.deepcopy(self.made)

    @functools.cached_property
    def expected(self) -> Outputs:
        """Outputs of the first instance for two images."""
        return detached(self.call(self.part(), self.inputs(2)))


@torch.no_grad()
def stir(module: nn.Module) -> None:
    for index, p in enumerate(module.parameters()):
        if not p.is_meta and not p.any():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator("stir", index)).to(p.dtype))


def images(count: int, side: int) -> Tensor:
    """Return images (count, 3, side, side) in [-1, 1]; image i does not depend on ``count``."""
    return torch.stack([torch.rand(3, side, side, generator=generator("image", i)) * 2 - 1 for i in range(count)])


def normal(name: str, count: int, *shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=generator(name, i)) for i in range(count)])


def detached(outputs: Outputs) -> Outputs:
    return {name: value.detach().clone() for name, value in outputs.items()}


def shapes(outputs: Outputs, expected: dict[str, tuple[int, ...]], case: str) -> None:
    """Raise :class:`Fault`, naming the case, unless outputs are finite tensors of the expected shapes."""
    for name, shape in expected.items():
        value = outputs[name]
        if not isinstance(value, Tensor):
            raise Fault(f"{name} is a {type(value).__name__} for {case}; expected a tensor with shape {shape}")
        if tuple(value.shape) != shape:
            raise Fault(f"{name} has shape {tuple(value.shape)} for {case}; expected {shape}")
        if not value.isfinite().all():
            raise Fault(f"{name} is not finite for {case}")


def distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| (2-norms), with a denominator of at least 1 for scalars and 1e-12 otherwise."""
    difference = (a.double() - b.double()).norm().item()
    size = b.double().norm().item()
    return difference / max(size, 1.0 if b.dim() == 0 else 1e-12)


def reaches(value: Tensor, source: Tensor) -> bool:
    """Return whether the gradient of ``value`` with respect to ``source`` exists, is finite and is not all zero."""
    if not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value, source, allow_unused=True, retain_graph=True)
    return gradient is not None and bool(gradient.any()) and bool(gradient.isfinite().all())


def attribute(part: Any, name: str, kind: type | tuple[type, ...], meaning: str) -> Any:
    """Return an attribute required by the contract; raise :class:`Fault` if it is missing or has another type."""
    if not hasattr(part, name):
        raise Fault(f"has no attribute {name}: {meaning}")
    value = getattr(part, name)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise Fault(f"{name} = {value!r} is a {type(value).__name__}; expected {wanted}: {meaning}")
    return value


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Context manager that converts exceptions to a :class:`Fault` whose message starts with ``what``."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        raise Fault(f"{what}: {type(error).__name__}: {first}") from error
