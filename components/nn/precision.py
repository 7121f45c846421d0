"""Dtype helpers: fp32 for norms, cosines and losses inside bf16 regions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """Cast fp16 and bf16 to fp32; leave fp32 and fp64 unchanged (tests run whole steps in fp64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of a module's parameters, which its inputs must have; fp32 if it has none."""
    return next((p.dtype for p in module.parameters()), torch.float32)


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a device has fast bf16 products: every GPU here, and CPUs with AMX.

    AVX512_BF16 alone does not count: convolutions and matrix products take 1.5 times as long with it as in fp32.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.cpu.get_capabilities().get("amx_bf16", False)


def computed_on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with x; false for fake tensors, whose operations are counted for a GPU."""
    if x.device.type != "cpu":
        return False
    return torch.compiler.is_compiling() or not isinstance(x, torch._subclasses.FakeTensor)


def no_autocast(x: Tensor) -> torch.autocast:
    """Context manager that disables autocast on the device of x."""
    # Autocast does not support the meta device; use the CPU's flag, which trainer.estimate.fake_ranks reads.
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Context manager that disables TF32, which rounds the inputs of fp32 products to 10 mantissa bits."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before
