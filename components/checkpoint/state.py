"""State dicts of modules and optimizers for checkpoints, keyed by the names of the unwrapped module."""

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
    """Parameters and persistent buffers by their names in the unwrapped module, sharded or not."""
    return get_model_state_dict(module) if module.state_dict() else {}  # PyTorch raises for an empty state dict


def load_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load the result of :func:`module_state`."""
    if state:
        set_model_state_dict(module, state)


_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State and hyperparameters of an optimizer over parameters of ``module``, keyed by parameter name.

    Initializes the state of parameters that have not been stepped (zeros, step 0), so that saved and loaded states
    have the same keys; weights do not change.
    """
    _initialize(optimizer)
    return get_optimizer_state_dict(module, optimizer, options=_FLAT)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the result of :func:`optimizer_state`, including hyperparameters (lr, betas, ...)."""
    _initialize(optimizer)
    set_optimizer_state_dict(module, optimizer, state, options=_FLAT)


def _initialize(optimizer: torch.optim.Optimizer) -> None:
    # DCP's own initialization leaves Adam's step counter at 1 and skips optimizers if any parameter has state.
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
