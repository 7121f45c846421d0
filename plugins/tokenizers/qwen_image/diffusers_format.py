"""diffusers' ``AutoencoderKLQwenImage``: its keys, its 3-D kernels and its config.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.adapter import Exported, State, StateDictAdapter
from components.files.diffusers_folder import write_folder
from components.files.weights import WeightsError
from components.files.weights_file import WeightsFile

CLASS = "AutoencoderKLQwenImage"
# Our option, the key of config.json and diffusers' default for it.
OPTIONS = (
    ("latent_channels", "z_dim", 16),
    ("channels", "base_dim", 96),
    ("multipliers", "dim_mult", [1, 2, 4, 4]),
    ("res_blocks", "num_res_blocks", 2),
)
FIXED: dict[str, Any] = {"attn_scales": [], "dropout": 0.0, "input_channels": 3}
RESAMPLE = re.compile(r"(encoder\.down_blocks\.\d+|decoder\.up_blocks\.\d+\.upsamplers\.0)\.resample\.1\.weight")


class Diffusers(StateDictAdapter):
    """A file or folder of diffusers' ``AutoencoderKLQwenImage``.

    An exported folder is the same model for images. For videos it is not the original: weights for earlier frames, and
    those that change the frame rate, are zero.
    """

    name = "diffusers"
    summary = "the tokenizer, for AutoencoderKLQwenImage.from_pretrained"
    exports = ("tokenizer", "latent_norm")
    requires = ("tokenizer",)

    def recognizes(self, file: WeightsFile, role: str) -> bool:
        """Whether it is a diffusers folder, or has 3-D kernels under our keys."""
        return file.config is not None or any(value.ndim == 5 for value in file.tensors.values())

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take all tensors, of kernels the slice of the present frame; a folder must state the architecture.

        Raises:
            WeightsError: a folder is of another class, or has another architecture; the message lists the options.
        """
        if file.config is not None:
            self._compare(file.config, f"{what}: '{file.source}'")
        file.used |= file.tensors.keys()
        return {role: from_diffusers(file.tensors)}

    def to_foreign(self, state: State) -> State:
        """Convert to diffusers' keys and kernels."""
        return to_diffusers(state)

    def to_files(self, folder: Path, model: Exported) -> tuple[list[Path], str]:
        """Write a folder for ``diffusers.AutoencoderKLQwenImage.from_pretrained``, with the latents' statistics."""
        norm = model.states.get("latent_norm")
        about = {"_class_name": CLASS, "_diffusers_version": "0.35.0", **FIXED}
        about |= {theirs: self.plugin.architecture[ours] for ours, theirs, _ in OPTIONS}
        about["temperal_downsample"] = frame_rates(len(about["dim_mult"]))
        mean, std = torch.zeros(about["z_dim"]), torch.ones(about["z_dim"])
        if norm:
            mean, std = norm["running_mean"], norm["running_var"].sqrt()
        about |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        files = write_folder(folder, to_diffusers(model.states["tokenizer"]), about)
        return files, (
            f'Load it: diffusers.AutoencoderKLQwenImage.from_pretrained("{folder}"); for images, not for videos. The '
            "denoiser takes (z - latents_mean) / latents_std."
        )

    def _compare(self, config: dict[str, Any], source: str) -> None:
        if config.get("_class_name") != CLASS:
            raise WeightsError(f"{source}: _class_name = {config.get('_class_name')!r}; expected {CLASS!r}")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise WeightsError(f"{source}: {key} = {config[key]!r}; only {value!r} is supported")
        ours = self.plugin.architecture
        lines = [f"{o} = {config.get(k, default)}" for o, k, default in OPTIONS if config.get(k, default) != ours[o]]
        if lines:
            raise WeightsError(
                f"{source} has another architecture; to load it, set under [tokenizer]\n  " + "\n  ".join(lines)
            )


def frame_rates(levels: int) -> list[bool]:
    """Whether each level's downsampling halves the frame rate, as in the published model: all but the first."""
    return [level > 0 for level in range(levels - 1)]


def from_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the kernels' last slice, (O, I, T, k, k) -> (O, I, k, k); drop layers that change the frame rate."""
    found = {}
    for key, value in tensors.items():
        if ".time_conv." in key:
            continue
        if key.endswith(".gamma"):
            value = value.reshape(-1, 1, 1)
        found[key] = value[:, :, -1] if value.ndim == 5 else value
    return found


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`from_diffusers`, with zeros for earlier frames and for layers that change the frame rate."""
    found = {}
    for key, value in state.items():
        # In attention and resampling, diffusers treats frames as images: 2-D kernels and norms.
        flat = ".attentions." in key or ".resample." in key
        if key.endswith(".gamma"):
            found[key] = value if flat else value[..., None]
        elif value.ndim == 4 and not flat:
            frames = value.shape[-1]  # kernels are cubes
            found[key] = torch.cat([torch.zeros_like(value)[:, :, None]] * (frames - 1) + [value[:, :, None]], dim=2)
        else:
            found[key] = value
    return found | _frame_rate_layers(state)


def _frame_rate_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero weights of the layers that change the frame rate."""
    found: dict[str, Tensor] = {}
    down = [m[1] for m in map(RESAMPLE.fullmatch, state) if m and m[1].startswith("encoder")]
    up = [m[1] for m in map(RESAMPLE.fullmatch, state) if m and m[1].startswith("decoder")]
    # The encoder's first and the decoder's last change of resolution keep the frame rate.
    for place in [*down[1:], *up[:-1]]:
        weight = state[f"{place}.resample.1.weight"]
        width = weight.shape[1]
        out = width if place in down else 2 * width
        found[f"{place}.time_conv.weight"] = weight.new_zeros(out, width, 3, 1, 1)
        found[f"{place}.time_conv.bias"] = weight.new_zeros(out)
    return found
