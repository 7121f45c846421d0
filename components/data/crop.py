"""ADM's center crop (arXiv 2105.05233), of images in Pillow and of tensors.

Halve the image with a box filter while its shorter side is at least 2R, resize that side to R with a bicubic filter,
and crop the center. Both functions resize only what is needed of the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def crop_image(image: Image, resolution: int) -> Image:
    """Crop the central square of an RGB image and scale it to ``resolution`` (R) pixels per side.

    Differs from ADM's code by at most 1 of 255 levels, in about one value of 10,000, because Pillow stores the borders
    of the part to resize in float32.
    """
    from PIL.Image import Resampling

    middle = _middle(*image.size)
    if middle != (0, 0, *image.size):
        image = image.crop(middle)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    width, height, left, top = _resized(*image.size, resolution)
    if image.height > 2 * image.width:
        # Pillow 13 resizes the columns of tall images first, whose intermediate rounding differs.
        image = image.resize((width, height), Resampling.BICUBIC)
        return image.crop((left, top, left + resolution, top + resolution))
    # In two steps: in one, Pillow 13 may resize columns first, because only a part of the height is taken.
    x, y = image.width / width, image.height / height
    reach = 2 * max(y, 1) + 1  # of the bicubic filter, in rows
    first = max(math.floor(top * y - reach), 0)
    last = min(math.ceil((top + resolution) * y + reach), image.height)
    if last - first < image.height:
        image = image.crop((0, first, image.width, last))
    box = (left * x, 0, (left + resolution) * x, image.height)
    image = image.resize((resolution, image.height), Resampling.BICUBIC, box=box)
    box = (0, top * y - first, resolution, (top + resolution) * y - first)
    return image.resize((resolution, resolution), Resampling.BICUBIC, box=box)


def crop_tensor(image: Tensor, resolution: int) -> Tensor:
    """Crop and scale an image uint8 (3, H, W) with PyTorch's filters for uint8; returns a view (3, R, R).

    Differs from :func:`crop_image` by at most 2 of 255 levels, because the weights of these filters have 16 bits. Fast
    if the channels are last in memory, and so they are in the result.
    """
    if image.shape[1] > 2 * image.shape[2]:  # see crop_image
        return to_tensor(crop_image(to_image(image), resolution))
    left, top, right, bottom = _middle(image.shape[2], image.shape[1])
    # The filters only recognize channels_last by all four strides.
    x = image[:, top:bottom, left:right].permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    while min(x.shape[2:]) >= 2 * resolution:
        x = _halved(_halved(x, 3), 2)
    width, height, left, top = _resized(x.shape[3], x.shape[2], resolution)
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x[0, :, top : top + resolution, left : left + resolution]


def to_tensor(image: Image) -> Tensor:
    """Convert an RGB image to uint8 (3, H, W), channels last in memory, as Pillow delivers them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image:
    """Convert uint8 (3, H, W) to an RGB image."""
    import PIL.Image

    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Box of the middle part with an aspect ratio of at most 16:1.

    ADM has no such limit, but a 1 x 60000 image would need 16 GB at R = 256.
    """
    longest = 16 * min(width, height)
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return left, top, left + min(width, longest), top + min(height, longest)


def _resized(width: int, height: int, resolution: int) -> tuple[int, int, int, int]:
    """Width and height after resizing, and the left and top of the central square."""
    scale = resolution / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return width, height, (width - resolution) // 2, (height - resolution) // 2


def _halved(x: Tensor, dim: int) -> Tensor:
    """Halve dimension 2 or 3 of an image uint8 (1, 3, H, W) as Pillow's box filter does.

    Of an odd number of lines, n = 2m + 1, it averages pairs from both ends towards the middle; line m joins a pair,
    with equal weights, if rounding in Pillow's arithmetic puts it inside the filter's borders.
    """
    lines, half = x.shape[dim], x.shape[dim] // 2
    size = [half if d == dim else x.shape[d] for d in (2, 3)]
    if lines % 2 == 0:
        return F.interpolate(x, size, mode="bilinear")  # at exactly one half, the mean of each pair
    middle = x.narrow(dim, half, 1)
    pairs = torch.cat((x.narrow(dim, 0, half), x.narrow(dim, half + 1, half)), dim)
    found = F.interpolate(pairs, size, mode="bilinear")
    scale = lines / half
    for place in {(half - 1) // 2, half // 2}:
        center = (place + 0.5) * scale
        inside = int(center - 0.5 * scale + 0.5) <= half < int(center + 0.5 * scale + 0.5)
        if inside and -0.5 < (half - center + 0.5) * (1 / scale) <= 0.5:
            pair = found.narrow(dim, place, 1)
            pair.copy_((2 * pair.int() + middle.int() + 1) // 3)
    return found
