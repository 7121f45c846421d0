"""python -m trainer import: convert weights of other programs to a model folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trainer import config as configs
from trainer.commands.export import writing_to

SUMMARY = "convert a published checkpoint, a tokenizer file or a diffusers folder to a model folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="REPA-E, SD or CompVis checkpoint, .safetensors, diffusers folder, a file of another format that the "
        "config's plugins read, or hf://org/repo/file[@revision]",
    )
    parser.add_argument("--config", required=True, help="TOML config of the architecture, e.g. from train_configs/")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer weights, if the main file has none (default: the file that the config names)",
    )
    parser.add_argument(
        "--stats", metavar="FILE", help="latent statistics: latents_scale and latents_bias, or mean and std"
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="denoiser weights (default: ema)")
    parser.add_argument("--out", required=True, help="model folder to write, for sample, evaluate and encode")
    parser.epilog = (
        "Every key must match; missing, unexpected and mis-shaped keys are listed. Code in a file is never executed.\n"
        "With --weights=ema, the raw weights of a training checkpoint are written to OUT/online.\n"
        "Any config key can be overridden: --section.key=value"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if int(os.environ.get("RANK", "0")):
        return 0  # one process writes
    config = configs.load(arguments.config, overrides)
    from components.files.model_file import write_model
    from components.finite import check_weights
    from trainer.models.importing import import_model

    found = import_model(
        config, arguments.file, tokenizer=arguments.tokenizer, stats=arguments.stats, weights=arguments.weights
    )
    out, toml = Path(arguments.out).expanduser(), config.to_toml()
    for states in (found.states, found.online):
        check_weights(states, "nothing was written: choose another file")
    with writing_to(out):
        written = write_model(out, found.states, toml, found.step, found.weights)
        if found.online:
            written += write_model(out / "online", found.online, toml, found.step, "online")
    print(f"Imported '{arguments.file}' (step {found.step}, {found.weights} weights):")
    for path in written:
        print(f"  {path}  ({path.stat().st_size / 2**20:,.1f} MiB)")
    uses = [f"Train on its tokenizer: --{configs.weights_key(config)}={out / 'tokenizer.safetensors'}"]
    if {"denoiser", "latent_norm"} <= found.states.keys():
        uses.insert(0, f"Use it: python -m trainer sample|evaluate|encode {out}")
    print("\n".join([*found.notes, *uses]))
    return 0
