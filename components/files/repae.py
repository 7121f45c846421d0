"""Checkpoints of the published REPA-E code, for denoisers with SiT's names of the label embedding.

A training checkpoint is a dict: ``model`` and ``ema``, each a SiT that includes its heads (``projectors.K``) and latent
norm (``bn``); ``vae``; ``discriminator``; the number of ``steps``; optimizers; and the command line as ``args``.
Second-stage checkpoints have neither ``vae`` nor ``discriminator``. A separate tokenizer consists of ``NAME.pt``,
``NAME-latents-stats.pt`` and ``NAME-discriminator-ckpt.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.files.adapter import Exported, State, StateDictAdapter, named
from components.files.model_file import save_tree
from components.files.weights_file import WeightsFile

# Prefixes of the modules that the published denoiser includes.
INSIDE = {"heads": "projectors.", "latent_norm": "bn."}
LABELS = "y_embedder.embedding_table.weight"
# Options of the published command line that cannot be inferred from shapes, and our config keys for them.
ARGUMENTS = {
    "resolution": "training.resolution",
    "encoder_depth": "denoiser.align_depth",
    "cfg_prob": "denoiser.label_dropout",
    "qk_norm": "denoiser.qk_norm",
    "path_type": "flow.path",
}


class RepaeCheckpoint(StateDictAdapter):
    """A training checkpoint of the published REPA-E code."""

    name = "repae"
    summary = "a training checkpoint and latent statistics for the published REPA-E code"
    exports = ("tokenizer", "denoiser", "latent_norm", "heads", "discriminator")
    requires = ("denoiser", "latent_norm")
    training_checkpoint = True
    arguments = ARGUMENTS

    def from_file(self, file: WeightsFile, role: str, what: str) -> dict[str, State]:
        """Take the denoiser and, where the file has them, heads and latent norm."""
        return split_denoiser(super().from_file(file, role, what)["denoiser"])

    def to_files(self, folder: Path, model: Exported) -> tuple[list[Path], str]:
        """Write ``NAME.pt``, without optimizer states, and ``NAME-latents-stats.pt``; NAME defaults to the step."""
        online = model.states if model.online is None else model.online
        found: dict[str, Any] = {"model": join_denoiser(online), "ema": join_denoiser(model.states)}
        # The same pairing as in sampling: the averaged tokenizer if the run has one, otherwise the raw one.
        held = {**online, **model.states}
        for part, theirs in (("tokenizer", "vae"), ("discriminator", "discriminator")):
            if part in held:
                found[theirs] = named(model.modules.named()[part], self.name).to_foreign(held[part])
        folder.mkdir(parents=True, exist_ok=True)
        name = model.name or f"{model.step:07d}"
        files = [folder / f"{name}.pt", folder / f"{name}-latents-stats.pt"]
        save_tree(files[0], found | {"steps": model.step})
        save_tree(files[1], latents_stats(model.states["latent_norm"]))
        notes = []
        if model.online is None:
            notes.append(f"'{model.source}' holds only {model.weights} weights, so `model` and `ema` are equal.")
        if lacking := [part for part in ("discriminator", "heads") if part not in model.states]:
            notes.append(f"It has no {' and no '.join(lacking)}, as '{model.source}' holds none.")
        uses = (
            f"Sample from it with the published REPA-E code, as EXPERIMENT/checkpoints/{name}.pt. That code cannot "
            "resume training from it: it holds no optimizer states."
        )
        return files, "\n".join([uses, *notes])

    @classmethod
    def num_classes(cls, file: WeightsFile, label_dropout: float) -> int:
        """Rows of the label embedding table under any prefix, without the null label's."""
        table = next((value for key, value in file.tensors.items() if key.endswith(LABELS)), None)
        return 0 if table is None else len(table) - (label_dropout > 0)


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


def latents_stats(latent_norm: State) -> State:
    """Content of ``-latents-stats.pt``: ``latents_scale`` = 1 / std and ``latents_bias`` = mean, (1, C, 1, 1) each."""
    scale, bias = latent_norm["running_var"].rsqrt(), latent_norm["running_mean"]
    return {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": bias.view(1, -1, 1, 1)}
