"""Names of measures and encoders -> networks with weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from components import registry
from components.evaluation.inception import Inception
from components.evaluation.measures import ENDINGS
from components.evaluation.networks import EncoderNetwork, Network, native_grid
from components.files.fingerprint import fingerprint
from components.registry import nearest
from trainer import config as configs
from trainer.config import ConfigError
from trainer.config.schema import PluginTable
from trainer.run.assemble import make_plugin


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder on the command line or in [evaluation]: "dinov2", or "dinov2:size=l,grid=16".

    Attributes:
        label: of the measure, "fd_" and this.
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
        """Raises :class:`ConfigError` with what is allowed. Plugins must have been discovered."""
        name, _, rest = text.partition(":")
        words = [f"--{word}" for word in rest.split(",") if word]
        if bad := [word for word in words if "=" not in word]:
            raise ConfigError(f"encoder '{text}': '{bad[0][2:]}' is no option; expected NAME:key=value,key=value")
        options = dict(configs.parse_overrides(words))
        plugin = registry.encoders.get(name)
        grid = options.pop("grid", native_grid(plugin.cls))
        if not isinstance(grid, int) or grid < 1:
            raise ConfigError(f"encoder '{text}': grid = {grid!r}; expected tokens per side, at least 1")
        configs.check_table(plugin.schema(), options, f"encoder '{text}': ")
        return EncoderSpec(re.sub(r"[^0-9a-zA-Z]+", "_", text).strip("_"), name, options, grid)


@dataclass(frozen=True)
class Measured:
    """A network and what is wanted of it.

    Attributes:
        label: "" for Inception, else the encoder's.
        metrics: names in :mod:`components.evaluation.measures`.
    """

    label: str
    network: Network
    metrics: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the network from others, wherever its file lies."""
        return {key: value for key, value in self.network.about.items() if key != "file"}

    def name(self, metric: str) -> str:
        """As it is reported: "fid", "fd_dinov2"."""
        return f"{metric}_{self.label}" if self.label else metric

    def ending(self, feature: str) -> str:
        """Of the feature's moments in a statistics file."""
        return f"_{self.label}" if self.label else ENDINGS[feature]


def chosen_metrics(metrics: Sequence[str] | None, encoders: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The measures of a request; none named: all, or only the encoders' where encoders are named.

    Raises:
        ConfigError: an unknown name.
    """
    if metrics is None:
        return () if encoders else tuple(known)
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"--metrics: there is no '{metric}'{nearest(metric, known)}")
    return tuple(dict.fromkeys(metrics))


def make_networks(
    metrics: Sequence[str], encoders: Sequence[str], weights: str, resolution: int, device: torch.device
) -> list[Measured]:
    """Builds what the measures need, with weights.

    Args:
        metrics: of Inception.
        encoders: see :class:`EncoderSpec`.
        weights: file of Inception's; "": the published ones.
        resolution: pixels per side of the images.
        device: where they go.

    Raises:
        ConfigError: an encoder or an option does not exist.
        WeightsError: weights are missing; says how to get them.
    """
    found = [Measured("", Inception(weights).to(device), tuple(metrics))] if metrics else []
    for spec in map(EncoderSpec.parse, dict.fromkeys(encoders)):
        table = PluginTable(name=spec.name, **spec.options)
        encoder = make_plugin(f"encoder {spec.name}", "encoder", table, resolution, spec.grid)
        encoder.load_weights()
        about = {"name": spec.name, "options": spec.options, "grid": spec.grid, "sha256": fingerprint(encoder)}
        found.append(Measured(spec.label, EncoderNetwork(encoder, about).to(device), ("fd",)))
    return found


def network_warnings(networks: Sequence[Measured]) -> list[str]:
    """What must be said of the networks whenever their numbers are shown."""
    return [
        f"these are NOT the published Inception weights but {m.network.about['file']} (sha256 "
        f"{m.network.about['sha256'][:8]}): FID and the like compare with nothing published"
        for m in networks
        if m.network.about.get("published") is False
    ]
