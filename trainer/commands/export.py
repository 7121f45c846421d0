"""python -m trainer export: write a trained model in formats that other programs read."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.models.source import Stored

SUMMARY = "write a trained model as a diffusers folder, as safetensors, or as a published REPA-E checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="run folder (outputs/NAME), one of its checkpoints, model folder, or TOML config"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=("diffusers", "safetensors", "repae"),
        help="diffusers: the tokenizer, for AutoencoderKL.from_pretrained; safetensors: a model folder; repae: a "
        "training checkpoint and latent statistics in the layout of the published REPA-E code",
    )
    parser.add_argument(
        "--weights", choices=("ema", "online"), help="averaged (default) or raw weights; repae writes both"
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: the newest)")
    parser.add_argument("--parts", help="for safetensors: parts to write, e.g. tokenizer,denoiser (default: all)")
    parser.add_argument("--name", help="for repae: name of the files (default: the step, e.g. 0400000)")
    parser.add_argument("--out", help="output folder (default: export/FORMAT in the run folder)")
    parser.epilog = (
        "--weights applies to the tokenizer only if the run averages it; otherwise its raw weights are exported.\n"
        "docs/models.md describes the layouts.\n"
        "Any config key of the run can be overridden: --section.key=value"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if int(os.environ.get("RANK", "0")):
        return 0  # one process writes
    form = arguments.format
    for option, of in (("parts", "safetensors"), ("name", "repae")):
        if getattr(arguments, option) and form != of:
            raise ConfigError(f"--{option} applies only to --format={of}, not to --format={form}")
    if arguments.weights and form == "repae":
        raise ConfigError("--weights does not apply to --format=repae, which holds both averaged and raw weights")
    from trainer.models.source import read_source

    needs = ("tokenizer", "latent_norm") if form == "diffusers" else _wanted(arguments.parts)
    stored = read_source(
        arguments.source, weights=arguments.weights or "ema", step=arguments.step, overrides=overrides, needs=needs
    )
    if "tokenizer" in needs and "tokenizer" not in stored.states:
        stored.states["tokenizer"] = _tokenizer_of_config(stored)
    out = Path(arguments.out).expanduser() if arguments.out else _default_out(arguments, stored)
    with writing_to(out):
        if form == "diffusers":
            files, uses = _diffusers(stored, out)
        elif form == "safetensors":
            files, uses = _safetensors(stored, out, needs, explicit=bool(arguments.parts))
        else:
            files, uses = _repae(stored, out, arguments, overrides)
    both = f"{stored.path} at step {stored.step}, averaged and raw weights"
    print(f"Exported {both if form == 'repae' else stored.label}:")
    for file in files:
        print(f"  {file}  ({file.stat().st_size / 2**20:,.1f} MiB)")
    print(uses)
    return 0


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Context manager that turns an OSError (folder not writable, disk full) into a ConfigError about --out."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written: {error.strerror or error}") from error


def _wanted(text: str | None) -> Sequence[str]:
    from components.files.model_file import PARTS

    if not text:
        return PARTS
    names = [name.strip() for name in text.split(",")]
    if strange := [name for name in names if name not in PARTS]:
        raise ConfigError(f"--parts={text}: unknown part '{strange[0]}'; expected some of {', '.join(PARTS)}")
    return names


def _default_out(arguments: argparse.Namespace, stored: Stored) -> Path:
    if stored.run is None:
        raise ConfigError(f"'{arguments.source}' is not a run folder, so --out has no default; add --out=FOLDER")
    run = Path(arguments.source).expanduser()
    return (run if (run / "checkpoints").is_dir() else stored.run) / "export" / arguments.format


def _tokenizer_of_config(stored: Stored) -> dict[str, Tensor]:
    """Weights of the config's ``tokenizer.checkpoint``.

    Raises:
        ConfigError: the config names no tokenizer checkpoint.
    """
    from trainer.run.construct import make_plugin

    if not stored.config.tokenizer.options.get("checkpoint"):
        raise ConfigError(f"'{stored.path}' holds no trained tokenizer, and its config sets no tokenizer.checkpoint")
    tokenizer = make_plugin("tokenizer", "tokenizer", stored.config.tokenizer)
    tokenizer.load_weights()
    return tokenizer.state_dict()


def _diffusers(stored: Stored, out: Path) -> tuple[list[Path], str]:
    import torch

    from components.files.layouts import diffusers_kl
    from trainer.run.construct import make_plugin

    with torch.device("meta"):
        tokenizer = make_plugin("tokenizer", "tokenizer", stored.config.tokenizer)
    architecture = getattr(tokenizer, "architecture", None)
    if architecture is None:
        raise ConfigError(
            f"tokenizer.name = '{stored.config.tokenizer.name}' cannot be exported to diffusers' AutoencoderKL (it "
            "declares no `architecture`); use --format=safetensors"
        )
    norm = stored.states.get("latent_norm")
    mean, std = (norm["running_mean"], norm["running_var"].sqrt()) if norm else (None, None)
    config = diffusers_kl.config(architecture, stored.config.training.resolution, mean, std)
    files = diffusers_kl.write_folder(out, stored.states["tokenizer"], config)
    uses = f'Load it: diffusers.AutoencoderKL.from_pretrained("{out}")'
    if norm is None:
        return files, f"{uses}\nlatents_mean and latents_std are not set: the source has no latent norm."
    return files, (
        f"{uses}\nThe denoiser takes (z - latents_mean) / latents_std; scaling_factor and shift_factor approximate "
        "this by one number each."
    )


def _safetensors(stored: Stored, out: Path, needs: Sequence[str], explicit: bool) -> tuple[list[Path], str]:
    from components.files.model_file import write_model

    states = {name: stored.states[name] for name in needs if name in stored.states}
    lacking = [name for name in needs if name not in states]
    if lacking and explicit:
        raise ConfigError(f"--parts: '{stored.path}' holds no {lacking[0]}")
    files = write_model(out, states, stored.config.to_toml(), stored.step, stored.weights)
    takers = ["sample", "evaluate", "encode"] if {"tokenizer", "denoiser", "latent_norm"} <= states.keys() else []
    uses = [f"Use it: python -m trainer {'|'.join(takers)} {out}"] if takers else []
    if "tokenizer" in states:
        uses.append(f"Train on its tokenizer: --tokenizer.checkpoint={out / 'tokenizer.safetensors'}")
    return files, "\n".join(uses)


def _repae(ema: Stored, out: Path, arguments: argparse.Namespace, overrides: list[str]) -> tuple[list[Path], str]:
    from components.files.layouts import published
    from components.files.model_file import PARTS, save_tree
    from trainer.models.source import read_source

    for name in ("denoiser", "latent_norm"):
        if name not in ema.states:
            raise ConfigError(f"'{ema.path}' holds no {name}, which a REPA-E checkpoint requires")
    # A model folder written by import may hold the raw weights in online/.
    path = ema.run / "checkpoints" / f"step_{ema.step:08d}" if ema.run else Path(ema.path).expanduser() / "online"
    if path.is_dir():
        online, note = read_source(str(path), weights="online", overrides=overrides, needs=PARTS), ""
    else:
        online, note = ema, f"\n'{ema.path}' holds only {ema.weights} weights, so `model` and `ema` are equal."
    # The same pairing as in sampling: the averaged tokenizer if the run has one, otherwise the raw one.
    beside_denoiser = {name: ema.states[name] for name in ("tokenizer", "discriminator") if name in ema.states}
    out.mkdir(parents=True, exist_ok=True)
    name = arguments.name or f"{ema.step:07d}"
    files = [out / f"{name}.pt", out / f"{name}-latents-stats.pt"]
    save_tree(files[0], published.checkpoint(online.states | beside_denoiser, ema.states, ema.step))
    save_tree(files[1], published.latents_stats(ema.states["latent_norm"]))
    lacking = [part for part in ("discriminator", "heads") if part not in ema.states]
    if lacking:
        note += f"\nIt has no {' and no '.join(lacking)}, as '{ema.path}' holds none."
    return files, (
        f"Sample from it with the published REPA-E code, as EXPERIMENT/checkpoints/{name}.pt. That code cannot resume "
        f"training from it: it holds no optimizer states.{note}"
    )
