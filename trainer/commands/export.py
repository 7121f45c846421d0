"""python -m trainer export: write a trained model in formats that other programs read."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.files.lock import owned
from trainer.config import ConfigError, named_files, weights_key

if TYPE_CHECKING:
    from torch import Tensor

    from components.files.adapter import StateDictAdapter
    from trainer.config import Config
    from trainer.models.source import ModelWeights

OWN = "safetensors"
SUMMARY = "write a trained model as a diffusers folder, as safetensors, or in another format of its plugins"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="run folder (outputs/NAME), one of its checkpoints, model folder, or TOML config"
    )
    parser.add_argument(
        "--format",
        required=True,
        metavar="NAME",
        help="safetensors: a model folder; or a format that the model's tokenizer or denoiser declares, such as "
        "diffusers: the tokenizer, for AutoencoderKL.from_pretrained; repae: a training checkpoint and latent "
        "statistics in the layout of the published REPA-E code",
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
    if arguments.parts and form != OWN:
        raise ConfigError(f"--parts applies only to --format={OWN}, not to --format={form}")
    from trainer.models.source import read_source

    role, adapter = "", None
    if form != OWN:
        config = read_source(arguments.source, step=arguments.step, overrides=overrides, needs=()).config
        role, adapter = _format(config, form)
    both = adapter is not None and adapter.training_checkpoint
    if arguments.name and not both:
        raise ConfigError(
            f"--name applies only to training checkpoints, such as --format=repae, not to --format={form}"
        )
    if arguments.weights and both:
        raise ConfigError(f"--weights does not apply to --format={form}, which holds both averaged and raw weights")
    needs = _wanted(arguments.parts) if adapter is None else adapter.exports
    stored = read_source(
        arguments.source, weights=arguments.weights or "ema", step=arguments.step, overrides=overrides, needs=needs
    )
    if "tokenizer" in needs and "tokenizer" not in stored.states:
        stored.states["tokenizer"] = _tokenizer_of_config(stored)
    out = Path(arguments.out).expanduser() if arguments.out else _default_out(arguments, stored)
    with writing_to(out):
        if adapter is None:
            files, uses = _safetensors(stored, out, needs, explicit=bool(arguments.parts))
        else:
            files, uses = _foreign(stored, out, role, adapter, arguments, overrides)
    label = f"{stored.path} at step {stored.step}, averaged and raw weights" if both else stored.label
    print(f"Exported {label}:")
    for file in files:
        print(f"  {file}  ({file.stat().st_size / 2**20:,.1f} MiB)")
    print(uses)
    return 0


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Context manager that owns the folder, and turns an OSError (disk full) into a ConfigError about --out."""
    try:
        with owned(out, "--out"):
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


def _default_out(arguments: argparse.Namespace, stored: ModelWeights) -> Path:
    if stored.run is None:
        raise ConfigError(f"'{arguments.source}' is not a run folder, so --out has no default; add --out=FOLDER")
    run = Path(arguments.source).expanduser()
    return (run if (run / "checkpoints").is_dir() else stored.run) / "export" / arguments.format


def _tokenizer_of_config(stored: ModelWeights) -> dict[str, Tensor]:
    """Weights of the file that the config's tokenizer names.

    Raises:
        ConfigError: the config names no such file.
    """
    from trainer.run.construct import make_plugin

    if not named_files("tokenizer", stored.config.tokenizer):
        key = weights_key(stored.config)
        raise ConfigError(f"'{stored.path}' holds no trained tokenizer, and its config sets no {key}")
    tokenizer = make_plugin("tokenizer", "tokenizer", stored.config.tokenizer)
    tokenizer.load_weights()
    return tokenizer.state_dict()


def _safetensors(stored: ModelWeights, out: Path, needs: Sequence[str], explicit: bool) -> tuple[list[Path], str]:
    from components.files.model_file import write_model

    states = {name: stored.states[name] for name in needs if name in stored.states}
    lacking = [name for name in needs if name not in states]
    if lacking and explicit:
        raise ConfigError(f"--parts: '{stored.path}' holds no {lacking[0]}")
    classes = stored.classes.record() if stored.classes.names else None
    files = write_model(out, states, stored.config.to_toml(), stored.step, stored.weights, classes)
    takers = ["sample", "evaluate", "encode"] if {"tokenizer", "denoiser", "latent_norm"} <= states.keys() else []
    uses = [f"Use it: python -m trainer {'|'.join(takers)} {out}"] if takers else []
    if "tokenizer" in states:
        uses.append(f"Train on its tokenizer: --{weights_key(stored.config)}={out / 'tokenizer.safetensors'}")
    return files, "\n".join(uses)


def _format(config: Config, name: str) -> tuple[str, type[StateDictAdapter]]:
    """Role and adapter of the plugin that declares a format; raises ConfigError with the formats of this model."""
    from components import registry

    found = {}
    for role, table in (("tokenizer", config.tokenizer), ("denoiser", config.denoiser)):
        plugin = registry.KINDS[role].get(table.name).cls if table is not None else None
        found |= {adapter.name: (role, adapter) for adapter in (plugin.adapters if plugin else ()) if adapter.exports}
    if name in found:
        return found[name]
    plugins = f"tokenizer.name = '{config.tokenizer.name}'"
    if config.denoiser is not None:
        plugins += f" and denoiser.name = '{config.denoiser.name}'"
    formats = "".join(f"\n  --format={key}: {adapter.summary}" for key, (_, adapter) in found.items())
    raise ConfigError(
        f"--format={name}: {plugins} declare no such format; expected one of\n  --format={OWN}: a model folder{formats}"
    )


def _foreign(
    stored: ModelWeights,
    out: Path,
    role: str,
    make: type[StateDictAdapter],
    arguments: argparse.Namespace,
    overrides: list[str],
) -> tuple[list[Path], str]:
    """Write a format that the plugin of ``role`` declares."""
    from components.files.adapter import Exported
    from components.finite import check_weights
    from trainer.models.source import read_source
    from trainer.run.construct import construct_parts

    for name in make.requires:
        if name not in stored.states:
            raise ConfigError(f"'{stored.path}' holds no {name}, which --format={make.name} requires")
    online = stored.states
    if make.training_checkpoint:
        # A model folder written by import may hold the raw weights in online/.
        folder = Path(stored.path).expanduser() / "online"
        path = stored.run / "checkpoints" / f"step_{stored.step:08d}" if stored.run else folder
        online = None
        if path.is_dir():
            online = read_source(str(path), weights="online", overrides=overrides, needs=make.exports).states
    if "latent_norm" in stored.states and stored.states["latent_norm"]["running_mean"].ndim > 1:
        raise ConfigError(
            f"--format={make.name} states latent statistics per channel, but those of '{stored.path}' are per "
            f"position; use --format={OWN}"
        )
    for states in (stored.states, online or {}):
        check_weights(states, "nothing was written: choose another checkpoint (--step)")
    config = stored.config
    uses = frozenset(make.exports) - {"heads"}  # heads need encoders
    m = construct_parts(config, on_meta=True, uses=uses).modules
    return make(m.named()[role]).to_files(
        out,
        Exported(
            modules=m,
            states=stored.states,
            online=online,
            weights=stored.weights,
            step=stored.step,
            resolution=config.training.resolution,
            source=stored.path,
            name=arguments.name or "",
        ),
    )
