"""Finds a module's weights in a file of any layout and reports what else the file contains."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from components.files.layouts import diffusers_kl
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
# Training state stored with a tokenizer: losses, EMA, and VA-VAE's alignment with a foundation model.
BESIDE_TOKENIZER = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
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
    if role == "tokenizer" and diffusers_kl.is_diffusers(file.tensors):
        return True
    return any(prefix + key in file.tensors for prefix in PREFIXES[role] for key in own)


def take(file: WeightsFile, role: str, own: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Take a module's tensors from a file; return the prefix of their keys, and the tensors by key without it.

    Args:
        file: content of the file; its ``used`` is updated.
        role: a key of :data:`PREFIXES`.
        own: the module's keys. The prefix that matches the most of them is used; if none matches, all tensors are
            returned, so that a strict load can list them.
    """
    counts = [sum(prefix + key in file.tensors for key in own) for prefix in PREFIXES[role]]
    prefix = PREFIXES[role][counts.index(max(counts))] if max(counts) else ""
    found = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    file.used |= {prefix + key for key in found}
    return prefix, found


def tokenizer_state(
    file: WeightsFile, own: Collection[str], architecture: dict[str, Any] | None, what: str
) -> dict[str, Tensor]:
    """Take a tokenizer's state dict from any layout: CompVis, REPA-E, diffusers or ours.

    Ignores training state that is stored with tokenizers (:data:`BESIDE_TOKENIZER`).

    Args:
        file: content of the file; its ``used`` is updated.
        own: the tokenizer's keys.
        architecture: see :mod:`components.files.layouts.diffusers_kl`; None if diffusers cannot express it.
        what: owner of the weights in messages.

    Raises:
        WeightsError: a diffusers folder has another architecture; the message lists the options to set.
    """
    if file.config is not None:
        theirs = diffusers_kl.architecture(file.config, f"{what}: '{file.source}'")
        if architecture is None:
            raise WeightsError(f"{what}: '{file.source}' is a diffusers folder, which this tokenizer cannot load")
        if options := diffusers_kl.differences(architecture, theirs):
            raise WeightsError(
                f"{what}: '{file.source}' has another architecture; to load it, set under [tokenizer]\n  "
                + "\n  ".join(options)
            )
    if diffusers_kl.is_diffusers(file.tensors):
        file.used |= file.tensors.keys()
        return diffusers_kl.from_diffusers(file.tensors)
    prefix, found = take(file, "tokenizer", own)
    beside = {key for key in found if key not in own and key.startswith(BESIDE_TOKENIZER)}
    file.used -= {prefix + key for key in beside}
    return {key: value for key, value in found.items() if key not in beside}


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
