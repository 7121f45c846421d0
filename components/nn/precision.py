"""fp32 islands inside bf16 regions: norms, cosines and losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay (tests run whole steps in fp64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """What a module's inputs must be: its parameters' dtype; fp32 where it has none."""
    return next((p.dtype for p in module.parameters()), torch.float32)


def no_autocast(x: Tensor) -> torch.autocast:
    """Context in which operations on x's device keep their inputs' dtype."""
    # Autocast does not know the meta device; the CPU's flag stands for it (trainer.estimate.fake_ranks reads it).
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)
