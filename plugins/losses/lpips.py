"""LPIPS perceptual distance on VGG16 features (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from components.contracts import Posterior, ReconstructionLoss
from components.files.weights import hub_file, load_strict, read_state
from components.nn.precision import at_least_fp32, no_autocast
from components.registry import File, losses

# ImageNet mean and std for images in [-1, 1] instead of [0, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TAPS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3
MIN_SIDE = 2 ** (len(STAGES) - 1)  # pixels; one remains after the four poolings
EPS = 1e-10
WHAT = "loss lpips"
HUB_REPO = "timm/vgg16.tv_in1k"
HUB_FILE = "model.safetensors"
LINEAR = Path(__file__).with_suffix(".safetensors")  # the authors' version 0.1; license: lpips.LICENSE


@losses.register("lpips")
class LPIPS(ReconstructionLoss):
    """LPIPS perceptual distance between image and reconstruction, on frozen VGG16 features.

    State-dict keys: ``features.N.*`` as in torchvision's VGG16, and ``linear.K.weight`` for the K-th feature map.
    The network is not usable before ``load_weights``. Cost: VGG16's convolutions, forward for both images and
    backward for the reconstruction.

    Args:
        weight: weight in the tokenizer's loss.
        input_range: range of VGG16's input for images x in [-1, 1]: "unit": x, which LPIPS was trained with;
            "published": 2x - 1 in [-3, 1], as in the runs of the REPA-E paper; its code has passed x since July 2025.
        vgg_checkpoint: VGG16 weights file in torchvision's or timm's layout; none: timm's weights, from the Hugging
            Face cache or downloaded.
        linear_checkpoint: file of LPIPS's linear weights; none: the published ones, which ship with the plugin.
        precision: of VGG16's convolutions: "fp32", as in the published code; "run": bf16 in bf16 runs, which is faster,
            but rounds the gradient where image and reconstruction nearly agree. The rest is always computed in fp32.
    """

    keep_fp32 = True
    metric = "lpips"
    metric_options: ClassVar[dict[str, Any]] = {"input_range": "unit"}  # as in published values
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        weight: float = 1.0,
        input_range: Literal["published", "unit"] = "unit",
        vgg_checkpoint: File | None = None,
        linear_checkpoint: File | None = None,
        precision: Literal["fp32", "run"] = "fp32",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.input_range = input_range
        self.vgg_checkpoint = vgg_checkpoint
        self.linear_checkpoint = linear_checkpoint
        self.precision = precision
        self.register_buffer("shift", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.empty(1, 3, 1, 1), persistent=False)
        self.features = _vgg16_features()
        self.linear = nn.ModuleList(nn.Conv2d(stage[-1], 1, 1, bias=False) for stage in STAGES)
        self._fill_buffers()
        self.requires_grad_(False).eval()

    def load_weights(self) -> None:
        """Load the weights of VGG16 and of the linear layers.

        Raises:
            WeightsError: a file is missing or does not fit, or the download fails.
        """
        path = self.vgg_checkpoint or _hub_file()
        vgg = read_state(path, f"{WHAT} vgg_checkpoint")
        load_strict(self.features, _only_features(vgg), f"{WHAT} vgg_checkpoint", path)
        path = self.linear_checkpoint or LINEAR
        linear = read_state(path, f"{WHAT} linear_checkpoint")
        # Keys are lin0.model.1.weight (model.0 is a dropout) or lin0.weight.
        linear = {re.sub(r"^lin(\d)(\.model\.1)?\.", r"\1.", key): value for key, value in linear.items()}
        load_strict(self.linear, linear, f"{WHAT} linear_checkpoint", path)
        self._fill_buffers()

    def forward(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Return LPIPS(x, x_hat), a scalar; gradients flow to ``x_hat`` only.

        Args:
            x: images (B, 3, R, R) in [-1, 1], R at least 16.
            x_hat: reconstructions, same shape and range.
            posterior: unused.

        Raises:
            ValueError: a side is below 16 pixels.
        """
        if min(x.shape[-2:]) < MIN_SIDE:
            raise ValueError(f"{WHAT}: images of {x.shape[-2]} x {x.shape[-1]} px; minimum {MIN_SIDE} px per side")
        with contextlib.nullcontext() if self.precision == "run" else no_autocast(x_hat):
            with torch.no_grad():
                target = self._unit_features(x)
            features = self._unit_features(x_hat)
        with no_autocast(x_hat):
            layers = zip(self.linear, target, features)
            return torch.stack([linear((y - y_hat).square()).mean() for linear, y, y_hat in layers]).sum()

    def _unit_features(self, images: Tensor) -> list[Tensor]:
        """Return five feature maps whose channel vectors have unit length."""
        h = at_least_fp32(images)
        if self.input_range == "published":
            h = 2 * h - 1
        h = (h - self.shift) / self.scale
        maps = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in TAPS:
                wide = at_least_fp32(h)
                # At zero, the gradient of vector_norm is zero; that of a square root would be infinite.
                maps.append(wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + EPS))
        return maps

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        self.shift.copy_(self.shift.new_tensor(SHIFT).view(1, 3, 1, 1))
        self.scale.copy_(self.scale.new_tensor(SCALE).view(1, 3, 1, 1))


def _vgg16_features() -> nn.Sequential:
    """VGG16's layers up to relu5_3, indexed as in torchvision (without the last pooling, index 30)."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


def _only_features(vgg: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the convolutions of a VGG16 state dict, keyed by layer index; drop the classifier."""
    classifier = ("classifier.", "pre_logits.", "head.")
    return {key.removeprefix("features."): value for key, value in vgg.items() if not key.startswith(classifier)}


def _hub_file() -> Path:
    file = f"torchvision's vgg16-397923af.pth, or {HUB_FILE} of the repository {HUB_REPO}"
    return hub_file(WHAT, HUB_REPO, HUB_FILE, option="[losses.lpips] vgg_checkpoint", file=file)
