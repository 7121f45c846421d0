"""Selects metrics by name, and builds the feature networks that they need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from components import registry
from components.evaluation.encoder_network import EncoderNetwork
from components.evaluation.inception import Inception
from components.evaluation.statistics import NetworkMetrics
from components.files.fingerprint import fingerprint
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
    metrics: Sequence[str], encoders: Sequence[str], weights: str, resolution: int, device: torch.device
) -> list[NetworkMetrics]:
    """Build the networks that the metrics need, and load their weights.

    Args:
        metrics: on Inception features; "fdr6" stands for "fid" and the distances on five more encoders.
        encoders: specs, see :class:`EncoderSpec`.
        weights: file of Inception weights; "": the published ones.
        resolution: pixels per side of the images.
        device: to place the networks on.

    Raises:
        ConfigError: an encoder or an option does not exist.
        WeightsError: weights are missing; the message says how to obtain them.
    """
    specs = [EncoderSpec.parse(text) for text in dict.fromkeys(encoders)]
    if "fdr6" in metrics:
        specs += [replace(EncoderSpec.parse(member.encoder), label=member.label) for member in MEMBERS]
        metrics = [name for name in dict.fromkeys(["fid", *metrics]) if name != "fdr6"]
    found = [NetworkMetrics("", Inception(weights).to(device), tuple(metrics))] if metrics else []
    for spec in specs:
        table = PluginTable(name=spec.name, **spec.options)
        encoder = make_plugin(f"encoder {spec.name}", "encoder", table, resolution, spec.grid)
        encoder.load_weights()
        about = {"name": spec.name, "options": spec.options, "grid": spec.grid, "sha256": fingerprint(encoder)}
        found.append(NetworkMetrics(spec.label, EncoderNetwork(encoder, about).to(device), ("fd",)))
    return found
