"""Procedurally drawn dataset of ten colored shapes, labeled, that needs no download."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components import registry
from components.contracts import Dataset, DatasetItem
from components.files.fingerprint import fingerprint
from components.files.weights import load_strict, read_state

SPLITS = ("train", "heldout", "judge")
SHAPES = 10
LUMA = (0.299, 0.587, 0.114)


@registry.datasets.register("shapes")
class Shapes(Dataset):
    """Ten colored shapes on gradients, drawn on the fly: deterministic, any resolution, no download.

    An image is a pure function of (seed, split, index): ``resolution`` only sets how finely the scene is sampled, and
    ``size`` only the number of images. Index i has class i mod 10, so classes are balanced. Color, position, size and a
    small rotation vary. The shape's luma differs from that of every background pixel by at least 0.2 (on a scale of 0
    to 1), so it is always visible. Mirroring preserves all classes.

    Args:
        size: number of images, at least 10.
        split: one of three disjoint streams of images; the judge was trained on "judge" only.
        seed: seed of the stream of images, at least 0.
        flip: allow horizontal flips in training.
        variety: how much position, size and rotation vary: 1: fully; 0: all shapes are large, centered and upright.
        labels: false: the images have one class and no judge of it, so that a model must find the shapes by itself. The
            judge's features remain, for the Frechet distance.

    Raises:
        ValueError: the resolution is below 16, ``size`` below 10, ``seed`` negative, ``split`` unknown, or
            ``variety`` outside [0, 1].
    """

    class_names: tuple[str, ...] = (
        "disc",
        "ring",
        "square",
        "diamond",
        "triangle",
        "cross",
        "star",
        "heart",
        "moon",
        "arrow",
    )
    num_classes = SHAPES
    has_judge = True
    judge_dim = 96

    def __init__(
        self,
        resolution: int,
        *,
        size: int = 50_000,
        split: Literal["train", "heldout", "judge"] = "train",
        seed: int = 0,
        flip: bool = False,
        variety: float = 1.0,
        labels: bool = True,
    ) -> None:
        for allowed, key, value, bound in (
            (resolution >= 16, "resolution", resolution, "at least 16, so that the shapes are distinguishable"),
            (size >= SHAPES, "size", size, f"at least {SHAPES}, one image per class"),
            (0 <= seed < 2**64, "seed", seed, "at least 0 and below 2**64"),
            (split in SPLITS, "split", repr(split), f"one of {', '.join(SPLITS)}"),
            (0 <= variety <= 1, "variety", variety, "between 0 and 1"),
        ):
            if not allowed:
                raise ValueError(f"dataset shapes: {key} = {value} is not allowed; it must be {bound}")
        self.resolution = resolution
        self.size = size
        self.split = split
        self.seed = seed
        self.flip = flip
        self.variety = variety
        self.has_judge = labels
        if not labels:
            self.class_names, self.num_classes = ("shape",), 1
        centers = (np.arange(resolution, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / resolution) - 1
        self._x, self._y = centers[None, :], -centers[:, None]  # x to the right, y up, both in (-1, 1)

    def __len__(self) -> int:
        return self.size

    def class_counts(self) -> list[int]:
        return [len(range(label, self.size, self.num_classes)) for label in range(self.num_classes)]

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the image (uint8, (3, R, R)) and its class.

        Raises:
            IndexError: ``index`` is outside [-size, size).
        """
        if not -self.size <= index < self.size:
            raise IndexError(f"dataset shapes: index {index} is outside its {self.size} images")
        index %= self.size
        u = self._uniform(index)
        shape = index % SHAPES
        image = torch.from_numpy(self._paint(u, self._coverage(u, shape)))
        return DatasetItem(image, shape % self.num_classes)

    def mask(self, index: int) -> Tensor:
        """Return the fraction of each pixel of image ``index`` that the shape covers: float (R, R) in [0, 1]."""
        return torch.from_numpy(self._coverage(self._uniform(index), index % SHAPES))

    @torch.no_grad()
    def judge(self, images: Tensor) -> Tensor:
        """Classify generated images with a classifier trained on separate data.

        The classifier was trained only on split "judge", which is reserved for it, including blurred and noisy copies.
        Its accuracy on the first 5000 images of split "heldout" is 100 %
        (``python -m plugins.datasets.train_shapes_nets accuracy``).

        Args:
            images: (B, 3, R, R) float in [-1, 1] with any R (resized to 32), on any device.

        Returns:
            (B,) int64 labels in [0, 10).

        Raises:
            WeightsError: shapes_judge.safetensors, next to this file, is missing or unreadable.
        """
        return _load_judge(images.device)(images.float()).argmax(1)

    @torch.no_grad()
    def judge_features(self, images: Tensor) -> Tensor:
        """Features (B, 96) of the judge's last layer, for a Frechet distance; see :meth:`judge`."""
        return _load_judge(images.device).features(images.float())

    def judge_identity(self) -> str:
        return fingerprint(_load_judge(torch.device("cpu")))

    @staticmethod
    def untrained_judge() -> nn.Module:
        """Create the judge with random weights: (B, 3, R, R) in [-1, 1] -> (B, 10) logits."""
        return Judge()

    # Both use only + - * / sqrt and comparisons, which IEEE 754 rounds identically on every machine.

    def _coverage(self, u: list[float], label: int) -> np.ndarray:
        radius = 0.5 + 0.27 * (u[0] + (1 - self.variety) * (1 - u[0]))
        room = self.variety * (0.98 - 1.08 * radius)
        center_x, center_y = room * (2 * u[1] - 1), room * (2 * u[2] - 1)
        angle = self.variety * 0.26 * (2 * u[3] - 1)
        cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
        x, y = self._x - np.float32(center_x), self._y - np.float32(center_y)
        local_x = x * np.float32(cos) + y * np.float32(sin)
        local_y = y * np.float32(cos) - x * np.float32(sin)
        distance = SIGNED_DISTANCES[label](local_x, local_y)
        distance *= np.float32(-0.5 * radius * self.resolution)  # in pixels, positive inside
        distance += np.float32(0.5)
        return np.minimum(np.maximum(distance, 0, out=distance), 1, out=distance)

    def _paint(self, u: list[float], coverage: np.ndarray) -> np.ndarray:
        if u[4] < 0.5:  # dark on light, or light on dark
            lumas = 0.14 + 0.24 * u[5], 0.62 + 0.32 * u[6], 0.62 + 0.32 * u[7]
        else:
            lumas = 0.66 + 0.26 * u[5], 0.10 + 0.32 * u[6], 0.10 + 0.32 * u[7]
        shape = _color(lumas[0], u[8], 0.7 + 0.3 * u[9])
        start = _color(lumas[1], u[10], 0.2 + 0.6 * u[11])
        end = _color(lumas[2], u[10] + 0.4 * (u[12] - 0.5), 0.2 + 0.6 * u[11])
        direction = 2 * math.pi * u[13]
        cos, sin = math.cos(direction), math.sin(direction)
        scale = 0.5 / (abs(cos) + abs(sin))
        ramp = self._x * np.float32(scale * cos) + (self._y * np.float32(scale * sin) + np.float32(0.5))

        shape, start, end = np.array([shape, start, end], np.float32)[:, :, None, None] * np.float32(255)
        image = ramp * (end - start)
        image += start
        image += (shape - image) * coverage
        image += np.float32(0.5)
        return image.astype(np.uint8)  # truncation; with the 0.5 added above, rounding

    def _uniform(self, index: int) -> list[float]:
        """Return 14 samples from U[0, 1), a function of (seed, split, index) via the Philox key and counter."""
        key = np.array([self.seed, SPLITS.index(self.split)], dtype=np.uint64)
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(14).tolist()


def _color(luma: float, hue: float, chroma: float) -> tuple[float, float, float]:
    """RGB color in [0, 1] with exactly the given luma; hue in turns; chroma 1 is the most saturated such color."""
    red, green, blue = (min(max(abs((hue + turn) % 1.0 * 6 - 3) - 1, 0.0), 1.0) for turn in (0, 2 / 3, 1 / 3))
    gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    low, high = gray - min(red, green, blue), max(red, green, blue) - gray
    reach = chroma * min(luma / low, (1 - luma) / high)
    return luma + reach * (red - gray), luma + reach * (green - gray), luma + reach * (blue - gray)


# Signed distance functions: negative inside, in units of the shape's radius; x to the right, y up.


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - np.float32(0.88)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.72)) - np.float32(0.22)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.74)


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Half-diagonals 0.64 and 1.
    norm = math.hypot(1, 0.64)
    return np.abs(x) * np.float32(1 / norm) + (np.abs(y) * np.float32(0.64 / norm) - np.float32(0.64 / norm))


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Equilateral, circumradius 1.05.
    y = y + np.float32(0.1)
    sides = np.abs(x) * np.float32(math.sqrt(0.75)) + y * np.float32(0.5)
    return np.maximum(sides, -y) - np.float32(0.525)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(0.92), np.minimum(x, y) - np.float32(0.3))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Fold into the 36-degree sector between an outer vertex (up) and the next inner one.
    x = np.abs(x)
    x, y = _mirror(x, y, math.radians(72))
    x, y = _mirror(np.abs(x), y, math.radians(36))
    outer, inner = 1.05, 0.5
    edge_x, edge_y = inner * math.sin(math.radians(36)), inner * math.cos(math.radians(36)) - outer
    norm = math.hypot(edge_x, edge_y)
    return x * np.float32(-edge_y / norm) + (y - np.float32(outer)) * np.float32(edge_x / norm)


def _mirror(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Reflect points that lie clockwise of the line at ``angle`` from "up" to the other side."""
    normal_x, normal_y = math.cos(angle), -math.sin(angle)
    excess = np.maximum(x * np.float32(normal_x) + y * np.float32(normal_y), 0)
    return x - excess * np.float32(2 * normal_x), y - excess * np.float32(2 * normal_y)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A square standing on its corner, with a disc on each of its upper sides.
    half = 0.56
    x, y = np.abs(x), y + np.float32(0.1)
    square = (x + np.abs(y)) * np.float32(math.sqrt(0.5)) - np.float32(half)
    offset = np.float32(half * math.sqrt(0.5))
    dx, dy = x - offset, y - offset
    return np.minimum(square, np.sqrt(dx * dx + dy * dy) - np.float32(half))


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A disc minus a smaller disc to its right.
    x = x - np.float32(0.1)
    square = y * y
    shifted = x - np.float32(0.48)
    bite = np.float32(0.72) - np.sqrt(shifted * shifted + square)
    return np.maximum(np.sqrt(x * x + square) - np.float32(0.95), bite)


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Head: apex at y = 1, base at y = 0 with half-width 0.85; shaft down to y = -0.95.
    x = np.abs(x)
    norm = math.hypot(1, 0.85)
    head = np.maximum(x * np.float32(1 / norm) + (y - 1) * np.float32(0.85 / norm), -y)
    shaft = np.maximum(x - np.float32(0.27), np.abs(y + np.float32(0.4)) - np.float32(0.55))
    return np.minimum(head, shaft)


SIGNED_DISTANCES = (_disc, _ring, _square, _diamond, _triangle, _cross, _star, _heart, _moon, _arrow)


class Judge(nn.Module):
    """Classifier of shapes: (B, 3, R, R) in [-1, 1] -> (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 24, 1), (24, 48, 2), (48, 96, 2), (96, 96, 2)):
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(Shapes.judge_dim, SHAPES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, 96), the last layer's mean over positions."""
        images = images.clamp(-1, 1)
        if images.shape[-1] != 32:
            images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
        return self.layers(images).mean((2, 3))


@functools.cache
def _load_judge(device: torch.device) -> Judge:
    what, file = "judge of dataset shapes", Path(__file__).with_name("shapes_judge.safetensors")
    with torch.device("meta"):  # draws no random numbers, so a first call during training does not change the run
        judge = Judge()
    judge.to_empty(device="cpu").requires_grad_(False).eval()
    load_strict(judge, read_state(file, what), what, file)
    return judge.to(device)
