"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

FORMS = 'none, full, selective, "every N" (N >= 2), "budget F" (0 <= F <= 1)'

aten = torch.ops.aten
# Operators whose outputs are cheaper to store than to recompute: matrix products, convolutions, attention.
EXPENSIVE = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


@dataclass(frozen=True)
class Recompute:
    """Activation checkpointing policy of a network's units.

    Attributes:
        mode: ``none``; ``full``: recompute every unit from its inputs; ``every``: every n-th unit; ``selective``: every
            unit, but store the outputs of matrix products, convolutions and attention; ``budget``: the compiler
            decides, storing at most a fraction of what it would otherwise store.
        every: n of mode ``every``.
        budget: fraction of mode ``budget``, in [0, 1]; 0 is about ``full``, 1 is ``none``.
    """

    mode: Literal["none", "full", "every", "selective", "budget"] = "none"
    every: int = 1
    budget: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Recompute:
        """Parse one of :data:`FORMS`.

        Raises:
            ValueError: ``text`` is none of them.
        """
        if text in ("none", "full", "selective"):
            return cls(text)
        if (match := re.fullmatch(r"every (\d+)", text)) and int(match[1]) >= 2:
            return cls("every", every=int(match[1]))
        if (match := re.fullmatch(r"budget (\d*\.?\d+)", text)) and float(match[1]) <= 1:
            return cls("budget", budget=float(match[1]))
        raise ValueError(f"expected one of: {FORMS}")


def apply_recompute(module: nn.Module, recompute: Recompute) -> None:
    """Wrap units from ``module.units()`` in place; state-dict keys and results do not change.

    Call it before compiling and sharding. ``budget`` wraps nothing: the compiler implements it
    (:func:`backend_within`).
    """
    if recompute.mode in ("none", "budget"):
        return
    chosen = {id(unit) for unit in list(module.units())[recompute.every - 1 :: recompute.every]}
    context = partial(create_selective_checkpoint_contexts, _policy) if recompute.mode == "selective" else None
    extra = {"context_fn": context} if context else {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in chosen:
                setattr(parent, name, _plain_without_gradients(checkpoint_wrapper(child, **extra)))


def backend_within(budget: float, backend: str | Callable = "inductor") -> str | Callable:
    """Compiler backend that stores about the fraction ``budget`` of the activations and recomputes the rest.

    The budget is a global option of PyTorch's partitioner, set here only while a graph is compiled.
    """
    if budget >= 1:
        return backend

    def compile_within(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        from torch._dynamo.backends.registry import lookup_backend
        from torch._functorch import config

        with config.patch(activation_memory_budget=budget):
            return (lookup_backend(backend) if isinstance(backend, str) else backend)(graph, inputs)

    return compile_within


def _plain_without_gradients(wrapper: nn.Module) -> nn.Module:
    """Let a checkpointed unit run as it is without gradients, where torch 2.11 refuses forward-mode differentiation."""
    checkpointed = wrapper.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return wrapper._checkpoint_wrapped_module(*inputs, **options)
        return checkpointed(*inputs, **options)

    wrapper.forward = forward
    return wrapper


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
