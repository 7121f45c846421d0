"""Selects metrics by name, and builds the feature networks that they need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from components import registry
from components.evaluation.encoder_network import EncoderNetwork
from components.evaluation.inception import Inception
from components.evaluation.statistics import NetworkMetrics
from components.files.fingerprint import fingerprint
from components.files.weights import WeightsError
from components.registry import nearest
from trainer import config as configs
from trainer.config import ConfigError
from trainer.config.schema import PluginTable
from trainer.evaluation.fdr6 import MEMBERS
from trainer.run.construct import make_plugin


@dataclass(frozen=True)
class EncoderSpec:
    """Encoder spec from the command line or [evaluation]: "dinov2" or "dinov2:size=l,grid=16".

    Attributes:
        label: suffix of the metric's name: "fd_LABEL".
        name: of the plugin.
        options: of the plugin.
        grid: tokens per side.
    """

    label: str
    name: str
    options: dict[str, Any]
    grid: int

    @staticmethod
    def parse(text: str) -> EncoderSpec:
        """Parse a spec; the plugins must have been discovered.

        Raises:
            ConfigError: an option is unknown or malformed; states what is allowed.
        """
        name, _, rest = text.partition(":")
        words = [f"--{word}" for word in rest.split(",") if word]
        if bad := [word for word in words if "=" not in word]:
            raise ConfigError(f"encoder '{text}': '{bad[0][2:]}' is not key=value; expected NAME:key=value,key=value")
        options = dict(configs.parse_overrides(words))
        plugin = registry.encoders.get(name)
        grid = options.pop("grid", plugin.cls.native_grid)
        if not isinstance(grid, int) or grid < 1:
            raise ConfigError(f"encoder '{text}': grid = {grid!r}; expected tokens per side, at least 1")
        configs.check_table(plugin.schema(), options, f"encoder '{text}': ")
        return EncoderSpec(re.sub(r"[^0-9a-zA-Z]+", "_", text).strip("_"), name, options, grid)


def choose_metrics(
    metrics: Sequence[str] | None, encoders: Sequence[str], known: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """Metrics to compute: those named, without duplicates; if ``metrics`` is None, ``default``, or none with encoders.

    Raises:
        ConfigError: a name is unknown.
    """
    if metrics is None:
        return () if encoders else tuple(default)
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"--metrics: unknown metric '{metric}'{nearest(metric, known)}")
    return tuple(dict.fromkeys(metrics))


def make_networks(
    metrics: Sequence[str],
    encoders: Sequence[str],
    weights: str,
    resolution: int,
    device: torch.device,
    encoder_weights: Sequence[str] = (),
) -> list[NetworkMetrics]:
    """Build the networks that the metrics need, and load their weights.

    Args:
        metrics: on Inception features; "fdr6" stands for "fid" and the distances on five more encoders.
        encoders: specs, see :class:`EncoderSpec`.
        weights: file of Inception weights; "": the published ones.
        resolution: pixels per side of the images.
        device: to place the networks on.
        encoder_weights: "LABEL=FILE": weights of one of FDr6's encoders; the others are downloaded.

    Raises:
        ConfigError: an encoder or an option does not exist, or ``encoder_weights`` names no member of FDr6 or no file.
        WeightsError: weights are missing; the message says how to obtain them.
    """
    specs = [EncoderSpec.parse(text) for text in dict.fromkeys(encoders)]
    files = _weights_files(encoder_weights, "fdr6" in metrics)
    if "fdr6" in metrics:
        specs += [replace(EncoderSpec.parse(member.encoder), label=member.label) for member in MEMBERS]
        metrics = [name for name in dict.fromkeys(["fid", *metrics]) if name != "fdr6"]
    found = [NetworkMetrics("", Inception(weights).to(device), tuple(metrics))] if metrics else []
    for spec in specs:
        # The file is not among the options of ``about``: the fingerprint says which weights they are.
        given = {"checkpoint": files[spec.label]} if spec.label in files else {}
        table = PluginTable(name=spec.name, **spec.options, **given)
        encoder = make_plugin(f"encoder {spec.name}", "encoder", table, resolution, spec.grid)
        try:
            encoder.load_weights()
        except WeightsError as error:
            if spec.label not in {member.label for member in MEMBERS}:
                raise
            raise WeightsError(f"FDr6: {error}; or pass it by --encoder-weights={spec.label}=FILE") from error
        about = {"name": spec.name, "options": spec.options, "grid": spec.grid, "sha256": fingerprint(encoder)}
        found.append(NetworkMetrics(spec.label, EncoderNetwork(encoder, about).to(device), ("fd",)))
    return found


def _weights_files(words: Sequence[str], used: bool) -> dict[str, str]:
    """Files by label, from "LABEL=FILE"."""
    labels = [member.label for member in MEMBERS]
    found: dict[str, str] = {}
    if words and not used:
        raise ConfigError(
            f"--encoder-weights={words[0]} is for --metrics=fdr6; of others: --encoder=NAME:checkpoint=FILE"
        )
    for word in words:
        label, equals, file = word.partition("=")
        if label not in labels:
            raise ConfigError(f"--encoder-weights={word}: FDr6 has no such encoder{nearest(label, labels)}")
        if not equals or not (file.startswith("hf://") or Path(file).expanduser().is_file()):
            raise ConfigError(f"--encoder-weights={word}: expected LABEL=FILE with an existing file, or LABEL=hf://...")
        found[label] = file
    return found
