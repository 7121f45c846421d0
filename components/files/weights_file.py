"""Reads a weights file or folder, finds a module's tensors in it, and reports what else it contains."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.files.weights import WeightsError, local_file, read_tree

# Possible key prefixes of a module: in checkpoints of the published REPA-E code and of Lightning (CompVis, SD), or "".
PREFIXES = {
    "tokenizer": ("vae.", "state_dict.first_stage_model.", "first_stage_model.", "state_dict.", "model.", ""),
    "discriminator": (
        "discriminator.",
        "state_dict.loss.discriminator.",
        "state_dict.first_stage_model.loss.discriminator.",
        "loss.discriminator.",
        "state_dict.",
        "network.",
        "",
    ),
    "ema": ("ema.", "state_dict.", ""),
    "model": ("model.", "state_dict.", ""),
}
# Training state stored under the same prefix: losses, EMA, and VA-VAE's alignment with a foundation model.
BESIDE = {"tokenizer": ("loss.", "model_ema.", "foundation_model.", "linear_proj.")}
OUTER = ("state_dict", "loss")  # reports include the next key segment for these
# Key segments added by wrappers: DistributedDataParallel and torch.compile.
WRAPPERS = ("module", "_orig_mod")
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)

logger = logging.getLogger("titanrepa")


@dataclass
class WeightsFile:
    """Content of a weights file or folder.

    Attributes:
        source: path as given by the user.
        tensors: by dotted key; "vae.encoder.conv_in.weight" is ``vae["encoder.conv_in.weight"]`` of a checkpoint.
        values: everything else, by dotted key.
        config: config.json of a diffusers folder, or None.
        used: keys of the tensors that have been taken.
    """

    source: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    used: set[str] = field(default_factory=set)


def read(path: str | Path, what: str, part: str = "tokenizer") -> WeightsFile:
    """Read a weights file, a diffusers folder, or a part of a model folder.

    Args:
        path: local path, or ``hf://organization/name/file[@revision]``.
        what: owner of the weights in messages.
        part: part to read from a model folder (:mod:`components.files.model_file`).

    Raises:
        WeightsError: there is no such file, or it is damaged, would run code, or contains no tensors.
    """
    found = WeightsFile(str(path))
    file = local_file(path, what)
    if not file.is_dir():
        _flatten(read_tree(file, what), "", found)
    elif (file / "config.json").is_file():
        try:
            found.config = json.loads((file / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise WeightsError(f"{what}: '{file / 'config.json'}' is not JSON: {error}") from error
        for part in _diffusers_files(file, what):
            _flatten(read_tree(part, what), "", found)
    elif (file / f"{part}.safetensors").is_file():
        _flatten(read_tree(file / f"{part}.safetensors", what), "", found)
    else:
        raise WeightsError(
            f"{what}: the folder '{path}' contains neither {part}.safetensors (a model folder) nor config.json (a "
            "diffusers folder)"
        )
    if not found.tensors:
        raise WeightsError(f"{what}: checkpoint '{path}' contains no named tensors")
    return found


def holds(file: WeightsFile, role: str, own: Collection[str]) -> bool:
    """Whether a file has any tensor of a module; arguments as in :func:`take`."""
    return any(prefix + key in file.tensors for prefix in PREFIXES[role] for key in own)


def take(file: WeightsFile, role: str, own: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Take a module's tensors from a file; return the prefix of their keys, and the tensors by key without it.

    Leaves training state that is stored beside them (:data:`BESIDE`).

    Args:
        file: content of the file; its ``used`` is updated.
        role: a key of :data:`PREFIXES`.
        own: the module's keys. The prefix that matches the most of them is used; if none matches, all tensors are
            returned, so that a strict load can list them.
    """
    counts = [sum(prefix + key in file.tensors for key in own) for prefix in PREFIXES[role]]
    prefix = PREFIXES[role][counts.index(max(counts))] if max(counts) else ""
    found = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    beside = BESIDE.get(role, ())
    found = {key: value for key, value in found.items() if key in own or not key.startswith(beside)}
    file.used |= {prefix + key for key in found}
    return prefix, found


def stated_statistics(
    config: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (C,) of the latents in a diffusers folder; None if it states neither.

    Uses ``latents_mean`` and ``latents_std``, or the batch norm among the tensors (FLUX.2), or ``shift_factor`` and
    1 / ``scaling_factor`` for every channel.

    Args:
        config: content of config.json.
        tensors: of the folder's weights, by key.
    """
    if tensors and {"bn.running_mean", "bn.running_var"} <= tensors.keys():
        variance = tensors["bn.running_var"].double() + config.get("batch_norm_eps", 1e-4)
        return tensors["bn.running_mean"], variance.sqrt().to(tensors["bn.running_mean"].dtype)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return torch.tensor(mean).flatten(), torch.tensor(std).flatten()
    if config.get("scaling_factor") is None:
        return None
    channels = config.get("latent_channels", 4)
    shift = config.get("shift_factor") or 0.0
    return torch.full((channels,), float(shift)), torch.full((channels,), 1.0 / config["scaling_factor"])


def note_left_out(file: WeightsFile, what: str) -> None:
    """Log which tensors of a file were not taken, in one line."""
    if rest := left_out(file):
        logger.info("%s: of '%s', left out: %s", what, file.source, rest)


def left_out(file: WeightsFile) -> str:
    """Tensors that were not taken, as "opt.* (600 tensors), loss.discriminator.* (22 tensors), ...", in file order."""
    groups: Counter[str] = Counter()
    for key in file.tensors:
        if key not in file.used:
            segments = key.split(".")
            depth = next((i for i, name in enumerate(segments) if name not in OUTER), 0)
            groups[".".join(segments[: depth + 1])] += 1
    return ", ".join(name if name in file.tensors else f"{name}.* ({n} tensors)" for name, n in groups.items())


def _flatten(tree: Mapping[Any, Any], prefix: str, found: WeightsFile) -> None:
    for name, value in tree.items():
        key = ".".join(part for part in f"{prefix}{name}".split(".") if part not in WRAPPERS)
        if isinstance(value, Tensor):
            found.tensors[key] = value
        elif isinstance(value, Mapping):
            _flatten(value, f"{key}.", found)
        else:
            found.values[key] = value


def _diffusers_files(folder: Path, what: str) -> Sequence[Path]:
    """The weight files of a diffusers folder: one file, or the shards in an index."""
    file = next((folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{what}: the diffusers folder '{folder}' contains none of {', '.join(DIFFUSERS_FILES)}")
    if file.suffix != ".json":
        return [file]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{what}: '{file}' is not a shard index: {error!r}") from error
    return [folder / name for name in sorted(set(names))]
