"""Converts checkpoints of the published REPA-E code to our state dicts and back.

A training checkpoint is a dict: ``model`` and ``ema``, each a SiT that includes its heads (``projectors.K``) and latent
norm (``bn``); ``vae``; ``discriminator``; the number of ``steps``; optimizers; and the command line as ``args``.
Second-stage checkpoints have neither ``vae`` nor ``discriminator``. A separate tokenizer consists of ``NAME.pt``,
``NAME-latents-stats.pt`` and ``NAME-discriminator-ckpt.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# Prefixes of the modules that the published denoiser includes.
INSIDE = {"heads": "projectors.", "latent_norm": "bn."}
NETWORK = "network."  # prefix in our discriminator; its other tensors, LeCam averages, are not in the published layout
LABELS = "y_embedder.embedding_table.weight"
# Options of the published command line that cannot be inferred from shapes, and our config keys for them.
ARGUMENTS = {
    "resolution": "training.resolution",
    "encoder_depth": "denoiser.align_depth",
    "cfg_prob": "denoiser.label_dropout",
    "qk_norm": "denoiser.qk_norm",
    "path_type": "flow.path",
}


def split_denoiser(state: State) -> dict[str, State]:
    """Split a published SiT's state dict into "denoiser" and, if present, "heads" and "latent_norm"."""
    found: dict[str, State] = {"denoiser": {}}
    for key, value in state.items():
        part = next((name for name, prefix in INSIDE.items() if key.startswith(prefix)), "denoiser")
        found.setdefault(part, {})[key.removeprefix(INSIDE.get(part, ""))] = value
    return found


def join_denoiser(states: Mapping[str, State]) -> State:
    """Inverse of :func:`split_denoiser`; ignores the states of other modules."""
    joined = dict(states["denoiser"])
    for part, prefix in INSIDE.items():
        joined |= {f"{prefix}{key}": value for key, value in states.get(part, {}).items()}
    return joined


def to_discriminator(state: State) -> State:
    """Convert our discriminator's state dict to the published layout."""
    return {key.removeprefix(NETWORK): value for key, value in state.items() if key.startswith(NETWORK)}


def from_discriminator(state: State, own: Mapping[str, Tensor]) -> State:
    """Convert a published discriminator to ours, with zero LeCam averages as in a new run.

    Args:
        state: the published state dict.
        own: our module's state dict, for names and shapes; may be on the meta device.
    """
    averages = {key: torch.zeros(value.shape) for key, value in own.items() if not key.startswith(NETWORK)}
    return averages | {f"{NETWORK}{key}": value for key, value in state.items()}


def latents_stats(latent_norm: State) -> State:
    """Content of ``-latents-stats.pt``: ``latents_scale`` = 1 / std and ``latents_bias`` = mean, (1, C, 1, 1) each."""
    scale, bias = latent_norm["running_var"].rsqrt(), latent_norm["running_mean"]
    return {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": bias.view(1, -1, 1, 1)}


def num_classes(tensors: Mapping[str, Tensor], label_dropout: float) -> int:
    """Number of classes of a published denoiser from its label embedding table, under any prefix; 0 without a table.

    Args:
        tensors: the checkpoint's tensors by name.
        label_dropout: if positive, the table's last row is the null label.
    """
    table = next((value for key, value in tensors.items() if key.endswith(LABELS)), None)
    return 0 if table is None else len(table) - (label_dropout > 0)


def checkpoint(online: Mapping[str, State], ema: Mapping[str, State], step: int) -> dict[str, Any]:
    """Build a published training checkpoint, without optimizers, from our state dicts by module name.

    Args:
        online: "denoiser" and any of "heads", "latent_norm", "tokenizer" and "discriminator".
        ema: EMA of "denoiser", "heads" and "latent_norm".
        step: optimizer steps taken.
    """
    found: dict[str, Any] = {"model": join_denoiser(online), "ema": join_denoiser(ema)}
    if "tokenizer" in online:
        found["vae"] = online["tokenizer"]
    if "discriminator" in online:
        found["discriminator"] = to_discriminator(online["discriminator"])
    return found | {"steps": step}
