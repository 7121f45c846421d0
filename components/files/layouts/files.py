"""Finding a module's weights in a file of any layout, and saying what else was in it."""

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

# Where a module's keys may be, in the published REPA-E code's checkpoints, Lightning's (CompVis, SD), and bare.
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
# What training leaves beside a tokenizer: losses, averages, and VA-VAE's alignment with a foundation model.
BESIDE_TOKENIZER = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
OUTER = ("state_dict", "loss")  # what is inside tells more
# Segments of keys that wrappers add: DistributedDataParallel and torch.compile.
WRAPPERS = ("module", "_orig_mod")
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)

logger = logging.getLogger("titanrepa")


@dataclass
class WeightsFile:
    """What a file or folder holds.

    Attributes:
        source: as the user named it.
        tensors: by dotted key; "vae.encoder.conv_in.weight" is ``vae["encoder.conv_in.weight"]`` of a checkpoint.
        values: everything else, by dotted key.
        config: config.json of a diffusers folder.
        used: keys of the tensors that were taken.
    """

    source: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    used: set[str] = field(default_factory=set)


def read(path: str | Path, what: str, part: str = "tokenizer") -> WeightsFile:
    """Reads a weights file, a diffusers folder, or a part of a model folder.

    Args:
        path: local, or ``hf://organisation/name/file[@revision]``.
        what: whose weights they are, for messages.
        part: of a model folder (:mod:`components.files.model_file`).

    Raises:
        WeightsError: nothing of the kind is there; it is damaged; it would run code; it holds no tensors.
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
            f"{what}: the folder '{path}' holds neither {part}.safetensors (a model folder) nor config.json (a "
            "diffusers folder)"
        )
    if not found.tensors:
        raise WeightsError(f"{what}: checkpoint '{path}' holds no named tensors")
    return found


def holds(file: WeightsFile, role: str, own: Collection[str]) -> bool:
    """Whether a file has some tensor of a module; see :func:`take`."""
    if role == "tokenizer" and diffusers_kl.is_diffusers(file.tensors):
        return True
    return any(prefix + key in file.tensors for prefix in PREFIXES[role] for key in own)


def take(file: WeightsFile, role: str, own: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """A module's tensors, and the prefix under which they were.

    Args:
        role: a key of :data:`PREFIXES`.
        own: keys that the module has; most of them decide among prefixes. With none found the file is taken as it is,
            so that a strict load can name what is there.
    """
    counts = [sum(prefix + key in file.tensors for key in own) for prefix in PREFIXES[role]]
    prefix = PREFIXES[role][counts.index(max(counts))] if max(counts) else ""
    found = {key.removeprefix(prefix): value for key, value in file.tensors.items() if key.startswith(prefix)}
    file.used |= {prefix + key for key in found}
    return prefix, found


def tokenizer_state(
    file: WeightsFile, own: Collection[str], architecture: dict[str, Any] | None, what: str
) -> dict[str, Tensor]:
    """A tokenizer's state dict from any layout: CompVis, REPA-E, diffusers, ours.

    What is known to lie beside a tokenizer is left out.

    Args:
        own: the tokenizer's keys.
        architecture: what :mod:`components.files.layouts.diffusers_kl` compares with a config.json; None: not
            expressible.
        what: whose weights they are, for messages.

    Raises:
        WeightsError: a diffusers folder of another architecture, naming the options to set.
    """
    if file.config is not None:
        theirs = diffusers_kl.architecture(file.config, f"{what}: '{file.source}'")
        if architecture is None:
            raise WeightsError(f"{what}: '{file.source}' is a diffusers folder, which this tokenizer cannot take")
        if options := diffusers_kl.differences(architecture, theirs):
            raise WeightsError(
                f"{what}: '{file.source}' is of another architecture; to take it, set under [tokenizer]\n  "
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
    """One log line that names the tensors of a file that were not taken."""
    if rest := left_out(file):
        logger.info("%s: of '%s', left out: %s", what, file.source, rest)


def left_out(file: WeightsFile) -> str:
    """What was not taken, as "opt.* (600 tensors), loss.discriminator.* (22 tensors), ...", in order."""
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
    """The weights of a diffusers folder: one file, or the shards that an index names."""
    file = next((folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{what}: the diffusers folder '{folder}' holds none of {', '.join(DIFFUSERS_FILES)}")
    if file.suffix != ".json":
        return [file]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{what}: '{file}' is not an index of shards: {error!r}") from error
    return [folder / name for name in sorted(set(names))]
