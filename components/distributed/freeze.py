"""Temporary state of modules, restored on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from components.distributed.parallel import reshard, settle


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """No parameter of ``modules`` takes a gradient inside; gradients still flow through to their inputs.

    Both the forward and the backward pass belong inside: activation checkpointing runs the forward again during
    the backward, and must meet the same flags.
    """
    present = [module for module in modules if module is not None]
    # FSDP2 copies a flag from the shard to the whole weight when it gathers, and keeps a root gathered after its
    # forward pass: a flag set on a gathered weight is lost, and gradients leak or vanish without an error.
    settle(*present)
    reshard(*present)
    flags = [(p, p.requires_grad) for module in present for p in module.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        reshard(*present)
        for p, flag in flags:
            p.requires_grad_(flag)
