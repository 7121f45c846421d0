"""Temporarily freezing modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from components.distributed.parallel import reshard, settle


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Context manager in which no parameter of ``modules`` receives a gradient; gradients still reach their inputs.

    Run both the forward and the backward pass inside: activation checkpointing reruns the forward pass during the
    backward pass and must see the same ``requires_grad`` flags.
    """
    present = [module for module in modules if module is not None]
    # FSDP2 copies requires_grad from the shard to the full weight when it gathers, and keeps the root gathered after
    # its forward pass. A flag set while weights are gathered is lost: gradients silently leak or vanish.
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
