"""Temporary state of modules, restored on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """No parameter of ``modules`` takes a gradient inside; gradients still flow through to their inputs.

    Both the forward and the backward pass belong inside: activation checkpointing runs the forward again during
    the backward, and must meet the same flags.
    """
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in zip(parameters, flags):
            p.requires_grad_(flag)
