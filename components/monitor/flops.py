"""Counts floating-point operations (FLOPs) of PyTorch operators; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def formula(func) -> Callable[..., int] | None:
    """Function that computes an operator's FLOPs from its arguments and ``out_val``; None if they are not counted.

    Matrix products, convolutions and attention are counted. The backward pass of attention is counted as that of a
    fused kernel, which recomputes the scores.
    """
    packet = func._overloadpacket
    # Missing from the registry of some versions: count the CPU kernel as the GPU's.
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention_backward
    return flop_registry.get(packet)


class FlopCounter(TorchDispatchMode):
    """Context manager that counts FLOPs of code on tensors without data; reading a value (``item()``) returns 0.

    Attributes:
        flops: FLOPs so far.

    Raises:
        RuntimeError: an operation would communicate with other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} communicates with other ranks")
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).numpy().item()
        result = func(*args, **kwargs)
        if count := formula(func):
            self.flops += count(*args, **kwargs, out_val=result)
        return result


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
