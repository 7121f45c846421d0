"""The checkpoints of the published REPA-E code: what is kept where, both ways.

A training checkpoint is a dict: ``model`` and ``ema``, each a SiT with its heads (``projectors.K``) and latent norm
(``bn``) inside; ``vae``; ``discriminator``; the number of ``steps``; optimizers; and the command line as ``args``.
The second stage's has neither ``vae`` nor ``discriminator``. A tokenizer of its own comes as ``NAME.pt``,
``NAME-latents-stats.pt`` and ``NAME-discriminator-ckpt.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# Parts of a model that the published denoiser holds, by prefix.
INSIDE = {"heads": "projectors.", "latent_norm": "bn."}
NETWORK = "network."  # of our discriminator; its other tensors, averages for LeCam, have no place in the layout
LABELS = "y_embedder.embedding_table.weight"
# Options of the published command line that shapes do not show, and what they are called here.
ARGUMENTS = {
    "resolution": "training.resolution",
    "encoder_depth": "denoiser.align_depth",
    "cfg_prob": "denoiser.label_dropout",
    "qk_norm": "denoiser.qk_norm",
    "path_type": "flow.path",
}


def split_denoiser(state: State) -> dict[str, State]:
    """A published SiT's state dict -> those of "denoiser", "heads" and "latent_norm", as far as they are there."""
    found: dict[str, State] = {"denoiser": {}}
    for key, value in state.items():
        part = next((name for name, prefix in INSIDE.items() if key.startswith(prefix)), "denoiser")
        found.setdefault(part, {})[key.removeprefix(INSIDE.get(part, ""))] = value
    return found


def join_denoiser(states: Mapping[str, State]) -> State:
    """The reverse of :func:`split_denoiser`; other modules' states are left out."""
    joined = dict(states["denoiser"])
    for part, prefix in INSIDE.items():
        joined |= {f"{prefix}{key}": value for key, value in states.get(part, {}).items()}
    return joined


def to_discriminator(state: State) -> State:
    """Our discriminator's state dict -> the published one."""
    return {key.removeprefix(NETWORK): value for key, value in state.items() if key.startswith(NETWORK)}


def from_discriminator(state: State, own: Mapping[str, Tensor]) -> State:
    """The published discriminator -> ours, whose averages start at zero as in a new run.

    Args:
        own: our module's state dict, for names and shapes; it may be on the meta device.
    """
    averages = {key: torch.zeros(value.shape) for key, value in own.items() if not key.startswith(NETWORK)}
    return averages | {f"{NETWORK}{key}": value for key, value in state.items()}


def latents_stats(latent_norm: State) -> State:
    """The ``-latents-stats.pt`` of a latent norm: ``latents_scale`` = 1 / std and ``latents_bias``, (1, C, 1, 1)."""
    scale, bias = latent_norm["running_var"].rsqrt(), latent_norm["running_mean"]
    return {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": bias.view(1, -1, 1, 1)}


def num_classes(tensors: Mapping[str, Tensor], label_dropout: float) -> int:
    """Classes of a published denoiser by its table of label embeddings, under any prefix; 0 if there is none.

    Args:
        label_dropout: with a positive one the table's last row is the null label's.
    """
    table = next((value for key, value in tensors.items() if key.endswith(LABELS)), None)
    return 0 if table is None else len(table) - (label_dropout > 0)


def checkpoint(online: Mapping[str, State], ema: Mapping[str, State], step: int) -> dict[str, Any]:
    """A training checkpoint without its optimizers, from our modules' state dicts by name.

    Args:
        online: "denoiser" and what there is of "heads", "latent_norm", "tokenizer" and "discriminator".
        ema: averaged "denoiser", "heads" and "latent_norm".
        step: optimizer steps behind it.
    """
    found: dict[str, Any] = {"model": join_denoiser(online), "ema": join_denoiser(ema)}
    if "tokenizer" in online:
        found["vae"] = online["tokenizer"]
    if "discriminator" in online:
        found["discriminator"] = to_discriminator(online["discriminator"])
    return found | {"steps": step}
