"""python -m trainer encode: cache a dataset's latents, to train a denoiser on a frozen tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import config as configs

if TYPE_CHECKING:
    from components.distributed.parallel import World
    from trainer.caching.networks import Choices
    from trainer.models.source import LoadedModel

SUMMARY = "encode a dataset into a latent cache, to train a denoiser on it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="source of the tokenizer: a run folder, one of its checkpoints, a model folder, or a TOML config",
    )
    parser.add_argument(
        "--out", help="cache folder (default: latents/ in the source, or in the run folder of a TOML config)"
    )
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="dtype of cached tensors (default: fp16)"
    )
    parser.add_argument("--flip", action="store_true", help="also cache mirrored images; required if the dataset flips")
    parser.add_argument("--features", action="store_true", help="also cache the features of the config's encoders")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch and rank (default: 32)")
    parser.add_argument("--shard-size", type=int, default=4096, help="images per file (default: 4096)")
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="averaged (default) or raw weights")
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: the newest)")
    parser.epilog = (
        "Dataset and precision come from the config. Any config key can be overridden: --dataset.path=data/train\n"
        "Repeat the command to resume after an interruption. On a complete cache it verifies every file and\n"
        "rewrites damaged ones. Several GPUs: torchrun --nproc-per-node=8 -m trainer encode ...\n"
        "Then train: python -m trainer train CONFIG --latent_cache.path=OUT"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    for name in ("batch_size", "shard_size"):
        if (value := vars(arguments)[name]) < 1:
            raise configs.ConfigError(f"--{name.replace('_', '-')}={value}: expected at least 1")
    from components.distributed import parallel

    world = parallel.join_world()
    try:
        with parallel.lost_rank_named(lambda: "while encoding"):
            encode(arguments, overrides, world)
        return 0
    finally:
        parallel.leave_world()


def encode(arguments: argparse.Namespace, overrides: list[str], world: World) -> None:
    from components.distributed.ranks import Ranks
    from components.files.lock import owned
    from trainer.caching.networks import Choices
    from trainer.commands.train import set_backends
    from trainer.models.source import open_source

    needs = ("tokenizer", "encoders") if arguments.features else ("tokenizer",)
    source = open_source(
        arguments.source, world, weights=arguments.weights, step=arguments.step, overrides=overrides, needs=needs,
        dataset=True,
    )  # fmt: skip
    if arguments.features and not source.parts.modules.encoders:
        raise configs.ConfigError(f"--features: {source.path} has no [encoders.NAME] table")
    set_backends(source.config)
    names = ("dtype", "flip", "features", "batch_size", "shard_size")
    choices = Choices(**{name: vars(arguments)[name] for name in names})
    out = Path(arguments.out) if arguments.out else default_folder(source)
    check_classes(source, overrides)
    with owned(out, "--out", Ranks(None).first):
        fill(out, source, choices, world)


def check_classes(source: LoadedModel, overrides: list[str]) -> None:
    """Raise ConfigError if the source's dataset, unless named on the command line, lacks the classes it trained on."""
    from components.data.classes import Classes

    changed = source.classes.difference(Classes.of(source.parts.dataset))
    if changed and not any(word.startswith("--dataset") for word in overrides):
        raise configs.ConfigError(
            f"the dataset's classes differ from those that {source.path} was trained on (source -> now): {changed}. "
            "Restore the dataset, or name the one to encode: --dataset.KEY=VALUE"
        )


def fill(out: Path, source: LoadedModel, choices: Choices, world: World) -> None:
    """Encode what the folder lacks. Collective; rank 0 owns the folder."""
    from tqdm import tqdm

    from components.data.classes import Classes
    from components.latent_cache.cache import LatentCache
    from trainer.caching.encoding import Encoding

    if world.is_main:
        for note in Classes.of(source.parts.dataset).notes():
            print(f"note: {note}", file=sys.stderr)
    encoding = Encoding(out, source, choices, world)
    complete = not any(encoding.ranks.gather(encoding.missing()))

    images = sum(len(encoding.rows(number)) for number in encoding.missing())
    title = f"rank 0 of {world.size}" if world.size > 1 else None
    bar = tqdm(total=images, unit="image", desc=title, disable=None if world.is_main else True, dynamic_ncols=True)
    with bar:
        encoding.run(bar.update)
    if world.is_main:
        cache = LatentCache(out)
        size = sum(shard["size"] for shard in cache.index["shards"]) / 2**30
        unreadable = cache.index["unreadable"]
        print(
            f"{'Already complete, all files verified' if complete else 'Done'}: {len(cache)} images"
            f"{' and their mirrored copies' if cache.flipped else ''} in {out}/ ({size:.2f} GiB), encoded by the "
            f"tokenizer of {source.label}.\n"
            + (f"{len(unreadable)} were unreadable and replaced by other images.\n" if unreadable else "")
            + f"Train on it: python -m trainer train CONFIG --latent_cache.path={out}"
        )


def default_folder(source) -> Path:
    """Default cache folder: latents/ in the run or model folder."""
    path = Path(source.path).expanduser()
    return (source.run or (Path(source.config.run.dir) if path.suffix == ".toml" else path)) / "latents"
