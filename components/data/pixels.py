"""Conversion of images between uint8 and the range [-1, 1] of the models."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images of any shape to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)  # in place on the copy that float() makes of uint8


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images of any shape in [-1, 1] to uint8, rounding to nearest; clamps values outside."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
