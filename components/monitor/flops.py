"""Counts floating-point operations (FLOPs) of PyTorch operators; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten, DEVICE = torch.ops.aten, torch.ops.prim.device.default


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


def answer(func, args) -> Any:
    """What an operation that asks about a tensor without data returns: its device, or a value (0); None for others.

    Fake tensors are asked for their device more often than for anything else; asking through all modes is slow.
    """
    if func is DEVICE and isinstance(args[0], FakeTensor):
        return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
    if func is aten._local_scalar_dense.default:
        return torch.zeros((), dtype=args[0].dtype).numpy().item()
    return None


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
        if (answered := answer(func, args)) is not None:
            return answered
        result = func(*args, **kwargs)
        if count := formula(func):
            self.flops += count(*args, **kwargs, out_val=result)
        return result


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
