"""Adapter that lets generic checks construct, feed and call plugins of any kind, and helpers of checks."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import Network
from components.diffusion.random_numbers import generator
from trainer.plugin_kit.conformance.case import Failure

Outputs = dict[str, Tensor]
Inputs = tuple[Any, ...]


@dataclass(eq=False)
class Adapter:
    """How to construct, feed and call a plugin.

    Attributes:
        make: constructs an instance with random weights from a seed.
        inputs: returns fp32 inputs for a number of images, the same at every call.
        call: returns all outputs by name; tensors whose first dimension is the batch are compared image by image.
        learns: whether a recipe may train it.
        may_be_bf16: prefixes of the names of outputs that may be bf16 under autocast; the others must be fp32.
    """

    make: Callable[[int], Network]
    inputs: Callable[[int], Inputs]
    call: Callable[..., Outputs]
    learns: bool = True
    may_be_bf16: tuple[str, ...] = ()

    @functools.cached_property
    def _first(self) -> Network:
        return self.prepare(0)

    def prepare(self, seed: int) -> Network:
        """Return an instance in training's mode, with all-zero weights randomized so that no path is inactive."""
        part = self.make(seed).train(self.learns)
        randomize_zeros(part)
        return part

    def part(self) -> Any:
        """Return a copy of the instance of seed 0, which the caller may change."""
        return copy.deepcopy(self._first)

    def outputs(self, part: Network, count: int = 2) -> Outputs:
        """Return detached copies of the outputs of ``part`` for ``count`` images."""
        return {name: value.detach().clone() for name, value in self.call(part, self.inputs(count)).items()}

    @functools.cached_property
    def expected(self) -> Outputs:
        """Outputs of the instance of seed 0 for two images."""
        return self.outputs(self.part())


@torch.no_grad()
def randomize_zeros(module: nn.Module) -> None:
    for index, p in enumerate(module.parameters()):
        if not p.is_meta and not p.any():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator("stir", index)).to(p.dtype))


def images(count: int, side: int) -> Tensor:
    """Return images (count, 3, side, side) in [-1, 1]; image i does not depend on ``count``."""
    return torch.stack([torch.rand(3, side, side, generator=generator("image", i)) * 2 - 1 for i in range(count)])


def normal(name: str, count: int, *shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=generator(name, i)) for i in range(count)])


def shapes(outputs: Outputs, expected: tuple[int, ...], where: str) -> None:
    """Raise :class:`Failure` unless all outputs are finite tensors of the expected shape."""
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise Failure(f"{name} is a {type(value).__name__} for {where}; expected a tensor with shape {expected}")
        if tuple(value.shape) != expected:
            raise Failure(f"{name} has shape {tuple(value.shape)} for {where}; expected {expected}")
        if not value.isfinite().all():
            raise Failure(f"{name} is not finite for {where}")


def scalar(value: Any, name: str) -> None:
    """Raise :class:`Failure` unless ``value`` is a finite scalar tensor."""
    if not isinstance(value, Tensor) or value.dim():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Failure(f"{name} must be a scalar tensor, but is {shape}; take the mean")
    if not value.isfinite():
        raise Failure(f"{name} is {value.item()}")


def only_reported(values: dict[str, Any]) -> None:
    """Raise :class:`Failure` if a value that is logged carries a gradient."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise Failure(f"{name} is only reported, but carries a gradient; detach it")


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


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    """Context manager that converts exceptions to a :class:`Failure` whose message starts with ``what``."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        places = [f" ({line})" for line in lines if line.startswith("File ")]  # in errors of torch.compile
        raise Failure(f"{what}: {type(error).__name__}: {lines[0]}{places[-1] if places else ''}") from error
