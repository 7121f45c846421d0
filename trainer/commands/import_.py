"""python -m trainer import: weights of other programs as a model folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trainer import config as configs
from trainer.commands.export import writing_to

SUMMARY = "make a model folder of a published checkpoint, a tokenizer file, or a diffusers folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        help="REPA-E, SD or CompVis checkpoint, .safetensors, diffusers folder, or hf://org/repo/file[@revision]",
    )
    parser.add_argument("--config", required=True, help="TOML file of the architecture, as train_configs/*.toml")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="the tokenizer, where FILE has none (default: the config's)"
    )
    parser.add_argument(
        "--stats", metavar="FILE", help="latent statistics: latents_scale and latents_bias, or mean, std"
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="of the denoiser (default: ema)")
    parser.add_argument("--out", required=True, help="model folder to write, which sample, evaluate and encode take")
    parser.epilog = (
        "Every key must fit: missing, unexpected and mis-shaped ones are all named. Code in a file is never run.\n"
        "With --weights=ema the raw weights of a training checkpoint are kept in OUT/online.\n"
        "Any key of the config can be overridden: --section.key=value"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if int(os.environ.get("RANK", "0")):
        return 0  # one process writes
    config = configs.load(arguments.config, overrides)
    from components.files.model_file import write_model
    from trainer.models.importing import import_model

    found = import_model(
        config, arguments.file, tokenizer=arguments.tokenizer, stats=arguments.stats, weights=arguments.weights
    )
    out, toml = Path(arguments.out).expanduser(), config.to_toml()
    with writing_to(out):
        written = write_model(out, found.states, toml, found.step, found.weights)
        if found.online:
            written += write_model(out / "online", found.online, toml, found.step, "online")
    print(f"Imported '{arguments.file}' (step {found.step}, {found.weights} weights):")
    for path in written:
        print(f"  {path}  ({path.stat().st_size / 2**20:,.1f} MiB)")
    uses = [f"Train on its tokenizer: --tokenizer.checkpoint={out / 'tokenizer.safetensors'}"]
    if {"denoiser", "latent_norm"} <= found.states.keys():
        uses.insert(0, f"Use it: python -m trainer sample|evaluate|encode {out}")
    print("\n".join([*found.notes, *uses]))
    return 0
