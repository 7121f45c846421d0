"""diffusers' ``AutoencoderKL`` and ``AutoencoderKLFlux2``: their keys and config.json.

Our keys are those of CompVis's latent diffusion. An architecture is the dict in the tokenizer's ``architecture``:
latent_channels, channels (at full resolution), multipliers (of channels, per level), attention_levels (levels with
attention after each residual block), res_blocks (per encoder level), mid_attention, norm_groups, quant_conv, and patch
(of FLUX.2, else 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.adapter import Exported, State, StateDictAdapter
from components.files.diffusers_folder import write_folder
from components.files.weights import WeightsError
from components.files.weights_file import WeightsFile

# Our name, diffusers' name, and the kind of module. "#": an index; "^": a decoder level, which diffusers counts in
# reverse.
PLACES = (
    ("encoder.down.#.block.#", "encoder.down_blocks.#.resnets.#", "block"),
    ("encoder.down.#.attn.#", "encoder.down_blocks.#.attentions.#", "attention"),
    ("encoder.down.#.downsample.conv", "encoder.down_blocks.#.downsamplers.0.conv", ""),
    ("decoder.up.^.block.#", "decoder.up_blocks.^.resnets.#", "block"),
    ("decoder.up.^.attn.#", "decoder.up_blocks.^.attentions.#", "attention"),
    ("decoder.up.^.upsample.conv", "decoder.up_blocks.^.upsamplers.0.conv", ""),
    *((f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", "block") for side in ("encoder", "decoder")),
    *((f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", "attention") for side in ("encoder", "decoder")),
    *((f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", "block") for side in ("encoder", "decoder")),
    *((f"{side}.norm_out", f"{side}.conv_norm_out", "") for side in ("encoder", "decoder")),
)
INSIDE = {
    "block": (("nin_shortcut", "conv_shortcut"),),
    "attention": (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")),
    "": (),
}
# Names used before diffusers 0.17, as in the SD-VAE weights on the hub.
OLD = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
# diffusers' defaults for keys missing in a config.json; the only values that we support.
FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
FLUX2 = "AutoencoderKLFlux2"  # takes squares of latents as positions, and holds their statistics in a batch norm
BATCH_NORM, BATCH_NORM_EPS = "bn.", 1e-4


class Diffusers(StateDictAdapter):
    """A file or folder of diffusers' ``AutoencoderKL``."""

    name = "diffusers"
    summary = "the tokenizer, for AutoencoderKL.from_pretrained"
    exports = ("tokenizer", "latent_norm")
    requires = ("tokenizer",)

    def recognizes(self, file: WeightsFile, role: str) -> bool:
        """Whether it is a diffusers folder, or any of its keys is in diffusers' naming."""
        return file.config is not None or is_diffusers(file.tensors)

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take all tensors; a folder's config.json must state the tokenizer's architecture.

        Raises:
            WeightsError: a folder has another architecture; the message lists the options to set.
        """
        if file.config is not None:
            theirs = architecture(file.config, f"{what}: '{file.source}'")
            if options := differences(self.plugin.architecture, theirs):
                raise WeightsError(
                    f"{what}: '{file.source}' has another architecture; to load it, set under [tokenizer]\n  "
                    + "\n  ".join(options)
                )
        file.used |= file.tensors.keys()
        own = {key: value for key, value in file.tensors.items() if not key.startswith(BATCH_NORM)}
        return {role: from_diffusers(own)}

    def to_foreign(self, state: State) -> State:
        """Convert to diffusers' keys."""
        return to_diffusers(state)

    def to_files(self, folder: Path, model: Exported) -> tuple[list[Path], str]:
        """Write a folder for ``from_pretrained`` of diffusers' class, with the latent norm's statistics, if any."""
        norm = model.states.get("latent_norm")
        mean, std = (norm["running_mean"], norm["running_var"].sqrt()) if norm else (None, None)
        about = config(self.plugin.architecture, model.resolution, mean, std)
        tensors = to_diffusers(model.states["tokenizer"])
        if about["_class_name"] == FLUX2:
            tensors |= batch_norm(self.plugin.channels, mean, std)
        files = write_folder(folder, tensors, about)
        uses = f'Load it: diffusers.{about["_class_name"]}.from_pretrained("{folder}")'
        if norm is None:
            return files, f"{uses}\nIt states no latent statistics: the source has no latent norm."
        if about["_class_name"] == FLUX2:
            return files, f"{uses}\nThe denoiser takes 2 x 2 squares of latents, normalized by the folder's batch norm."
        return files, (
            f"{uses}\nThe denoiser takes (z - latents_mean) / latents_std; scaling_factor and shift_factor approximate "
            "this by one number each."
        )


def batch_norm(channels: int, mean: Tensor | None, std: Tensor | None) -> dict[str, Tensor]:
    """State of FLUX.2's batch norm over latents of mean and standard deviation (C,) each; None: 0 and 1."""
    mean = torch.zeros(channels) if mean is None else mean
    variance = torch.ones(channels) if std is None else std.square()
    found = {"running_mean": mean, "running_var": (variance - BATCH_NORM_EPS).clamp_min(0.0)}
    return {BATCH_NORM + key: value for key, value in found.items()} | {
        BATCH_NORM + "num_batches_tracked": torch.tensor(0)
    }


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether any of an autoencoder's keys is in diffusers' naming."""
    return any("_blocks." in key or ".mid_block." in key for key in keys)


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a tokenizer's state dict to diffusers' keys; 1 x 1 convolutions of attention become linear layers."""
    levels = _levels(state, "encoder.down.")
    converted = {}
    for key, value in state.items():
        name = _translate(key, levels, 0)
        converted[name] = value.flatten(1) if _is_projection(name) and value.ndim == 4 else value
    return converted


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`to_diffusers`; unknown keys are kept."""
    levels = _levels(state, "encoder.down_blocks.")
    converted = {}
    for key, value in state.items():
        *rest, leaf, kind = key.split(".")
        if leaf in OLD and "attentions" in rest:  # rename to our name, which _translate leaves unchanged
            key = ".".join([*rest, OLD[leaf], kind])
        name = _translate(key, levels, 1)
        projection = _is_projection(key) or leaf in OLD
        converted[name] = value[:, :, None, None] if projection and value.ndim == 2 else value
    return converted


def config(architecture: dict[str, Any], resolution: int, mean: Tensor | None, std: Tensor | None) -> dict[str, Any]:
    """Content of config.json for an architecture.

    ``latents_mean`` and ``latents_std`` are per channel. ``scaling_factor`` and ``shift_factor`` are scalars for
    programs that support only those: (z - shift_factor) * scaling_factor has mean 0 and variance 1 over all elements.
    Use one pair or the other, never both. FLUX.2's class has neither (see :func:`batch_norm`).

    Args:
        architecture: see the module docstring.
        resolution: image side in pixels, the ``sample_size``.
        mean: mean of the latents per channel (C,); None if unknown, then ``scaling_factor`` is 1.
        std: standard deviation of the latents per channel (C,).
    """
    a = architecture
    if a["patch"] > 1:
        found = config(a | {"patch": 1}, resolution, None, None) | {"_class_name": FLUX2}
        found |= {"patch_size": [a["patch"]] * 2, "batch_norm_eps": BATCH_NORM_EPS, "batch_norm_momentum": 0.1}
        return {key: value for key, value in found.items() if key not in ("scaling_factor", "force_upcast")}
    attention = [level in a["attention_levels"] for level in range(len(a["multipliers"]))]
    found = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.35.0",
        **FIXED,
        "block_out_channels": _widths(a),
        "down_block_types": [DOWN[has] for has in attention],
        "up_block_types": [UP[has] for has in reversed(attention)],
        "layers_per_block": a["res_blocks"],
        "latent_channels": a["latent_channels"],
        "norm_num_groups": a["norm_groups"],
        "mid_block_add_attention": a["mid_attention"],
        "use_quant_conv": a["quant_conv"],
        "use_post_quant_conv": a["quant_conv"],
        "sample_size": resolution,
        "force_upcast": True,
        "scaling_factor": 1.0,
    }
    if mean is not None and std is not None:
        mean, std = mean.double(), std.double()
        variance = std.square().mean() + mean.var(correction=0)
        found |= {"scaling_factor": variance.rsqrt().item(), "shift_factor": mean.mean().item()}
        found |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    return found


def architecture(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Read the architecture from the content of a config.json.

    Args:
        config: the parsed file.
        source: name of the file in messages.

    Raises:
        WeightsError: it is not an AutoencoderKL, or one that we do not support.
    """

    def refuse(why: str) -> WeightsError:
        return WeightsError(f"{source}: {why}, which our autoencoders do not support")

    flux2 = config.get("_class_name") == FLUX2
    if not flux2 and config.get("_class_name") != "AutoencoderKL":
        raise refuse(f"_class_name = {config.get('_class_name')!r} instead of 'AutoencoderKL' or '{FLUX2}'")
    widths = list(config.get("block_out_channels", [128, 256, 512, 512] if flux2 else [64]))
    patch_size = tuple(config.get("patch_size", (2, 2))) if flux2 else (1, 1)
    if config.get("decoder_block_out_channels") not in (None, widths) or patch_size[0] != patch_size[-1]:
        raise refuse("a decoder of other channels than the encoder, or patches that are not square")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise refuse(f"{key} = {config[key]!r} instead of {value!r}")
    levels = 4 if flux2 else 1  # of diffusers' defaults
    down = list(config.get("down_block_types", DOWN[:1] * levels))
    up = list(config.get("up_block_types", UP[:1] * levels))[::-1]
    strange = [name for name in (*down, *up) if name not in (*DOWN, *UP)]
    if strange:
        raise refuse(f"blocks of type {strange[0]}")
    attention = [DOWN.index(name) for name in down]
    if attention != [UP.index(name) for name in up]:
        raise refuse("attention in different levels of encoder and decoder")
    quant_conv = config.get("use_quant_conv", True)
    if quant_conv != config.get("use_post_quant_conv", True):
        raise refuse("only one of use_quant_conv and use_post_quant_conv")
    channels = math.gcd(*widths)
    return {
        "latent_channels": config.get("latent_channels", 32 if flux2 else 4),
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "attention_levels": [level for level, has in enumerate(attention) if has],
        "res_blocks": config.get("layers_per_block", 2 if flux2 else 1),
        "mid_attention": config.get("mid_block_add_attention", True),
        "norm_groups": config.get("norm_num_groups", 32),
        "quant_conv": quant_conv,
        "patch": patch_size[0],
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Options, as TOML lines, that turn our architecture into theirs; compares channels * multipliers, not each."""
    found = {key: theirs[key] for key in ours if ours[key] != theirs[key]}
    if _widths(ours) == _widths(theirs):
        found = {key: value for key, value in found.items() if key not in ("channels", "multipliers")}
    return [f"{key} = {str(value).lower() if isinstance(value, bool) else value}" for key, value in found.items()]


def _widths(architecture: dict[str, Any]) -> list[int]:
    return [architecture["channels"] * m for m in architecture["multipliers"]]


def _is_projection(key: str) -> bool:
    """Whether a diffusers key is the weight of a linear layer in attention."""
    return ".attentions." in key and ".to_" in key and key.endswith(".weight")


def _levels(state: Iterable[str], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _translate(key: str, levels: int, side: int) -> str:
    """Translate our key to diffusers' (``side`` = 0) or theirs to ours (1); return unknown keys unchanged."""
    for place in PLACES:
        source, target = place[side], place[1 - side]
        match = re.fullmatch(re.escape(source).replace(r"\#", r"(\d+)").replace(r"\^", r"(\d+)") + r"\.(.+)", key)
        if match is None:
            continue
        *numbers, rest = match.groups()
        for number in numbers:
            mark = re.search(r"[#^]", target)[0]
            target = target.replace(mark, str(levels - 1 - int(number)) if mark == "^" else number, 1)
        for names in INSIDE[place[2]]:
            if rest.startswith(names[side] + "."):
                rest = names[1 - side] + rest.removeprefix(names[side])
                break
        return f"{target}.{rest}"
    return key
