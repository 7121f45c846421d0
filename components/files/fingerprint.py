"""Hashes of a module's weights, to check whether two files or runs have the same network."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from components.contracts import Tokenizer


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the state dict: names in sorted order, shapes, and values in fp32 (integers as int64).

    It covers a tokenizer's ``variant``, too.

    Independent of device, memory layout and storage dtype: weights cast to fp64 keep their fingerprint. Takes about a
    second per gigabyte. Collective if the module is sharded.
    """
    digest = hashlib.sha256(module.variant.encode() if isinstance(module, Tokenizer) else b"")
    for name, value in sorted(module.state_dict().items()):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        whole = whole.detach().to("cpu", torch.float32 if whole.is_floating_point() else torch.int64)
        digest.update(f"{name} {tuple(whole.shape)}\n".encode())
        digest.update(memoryview(whole.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
