"""The state of modules and optimizers as a checkpoint holds it: by the names of the bare module, sharded or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def module_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers by their names in the bare module, whatever wraps or shards it."""
    return get_model_state_dict(module) if module.state_dict() else {}  # which PyTorch's own refuses


def load_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Puts a loaded :func:`module_state` into the module."""
    if state:
        set_model_state_dict(module, state)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State and options of an optimizer over parameters of ``module``, keyed by the parameters' names.

    A parameter that has not been stepped yet receives the state of its first step now (zeros, step 0), so that
    what is saved and what it is loaded into have the same keys; no weight changes.
    """
    _initialise(optimizer)
    return get_optimizer_state_dict(module, optimizer, options=_FLAT)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts a loaded :func:`optimizer_state` into the optimizer, its options (lr, betas, ...) included."""
    _initialise(optimizer)
    set_optimizer_state_dict(module, optimizer, state, options=_FLAT)


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    # DCP's own initialisation leaves Adam's step counter at 1 and skips optimizers of which one parameter has state.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in params if p.requires_grad and not optimizer.state.get(p)]
    if not fresh:
        return
    grads = [p.grad for p in params]
    options = [dict(group) for group in optimizer.param_groups]
    try:
        for p in params:
            p.grad = None
        for p in fresh:
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        optimizer.step()
    finally:
        for group, before in zip(optimizer.param_groups, options):
            group.update(before)
        for p, grad in zip(params, grads):
            p.grad = grad
    for p in fresh:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor):
                value.zero_()
