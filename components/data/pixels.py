"""Conversion of images between uint8 and the range [-1, 1] of the models."""

from __future__ import annotations

import torch
from torch import Tensor

from components.finite import NotFiniteError, count_of, faulty_rows, sound_rows


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images of any shape to float32 in [-1, 1]; the same values on every device."""
    # By a tensor, since CUDA multiplies by the rounded inverse of a number. In place on the copy of float().
    return images.float().div_(torch.full((), 127.5, device=images.device)).sub_(1)


def bounded(images: Tensor) -> Tensor:
    """Clamp images (B, ...) to [-1, 1]; an image with a value that is not finite becomes NaN as a whole."""
    sound = sound_rows(images).view(-1, *[1] * (images.dim() - 1))
    return torch.where(sound, images.clamp(-1, 1), torch.nan)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images (B, ...) in [-1, 1] to uint8, rounding to nearest; clamps values outside.

    Raises:
        NotFiniteError: an image is not finite.
    """
    if faulty := faulty_rows(images):
        raise NotFiniteError(f"{count_of(faulty, len(images), 'images of a batch')}; the model's weights are unsound")
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
