"""python -m trainer train: runs a config, or goes on with it."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from components.version import versions
from trainer import config as configs

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from components.distributed.parallel import World

PROFILED = 3  # steps, where --profile does not say how many

SUMMARY = "train from a TOML config; the same command again goes on where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file, as train_configs/quickstart.toml")
    parser.add_argument(
        "--profile",
        nargs="?",
        const=PROFILED,
        metavar="STEPS",
        help=f"record so many steps (default: {PROFILED}) with PyTorch's profiler, into profile/ of the run's folder; "
        "[profile] in the config says when, and whether a GPU's memory, too",
    )
    parser.epilog = "Any key of the config can be overridden: --section.key=value\n\n" + configs.describe()


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.profile is not None:
        overrides = [*overrides, f"--profile.steps={profiled_steps(arguments.profile)}"]
    config = configs.load(arguments.config, overrides)
    from components.distributed import parallel

    world = parallel.join_world(config.parallel.timeout_s)
    try:
        set_backends(config)
        log_to(config, world)
        if world.is_main:
            logging.getLogger("titanrepa").info(versions())
        from trainer.run.loop import Trainer

        trainer = Trainer(config, world)
        if world.is_main:
            for place in trainer.parts.unused:
                logging.getLogger("titanrepa").info(f"recipe '{config.recipe.name}' does not use [{place}]")
        with parallel.lost_rank_named(lambda: f"at step {trainer.step}"):
            complete = trainer.run()
        if world.is_main:
            print(closing(config, trainer.step, complete, arguments.config), flush=True)
        return 0
    finally:
        parallel.leave_world()


def profiled_steps(text: str | int) -> int:
    """Of ``--profile=text``; ConfigError if it is no number of steps."""
    if not str(text).isdecimal() or int(text) < 1:
        raise configs.ConfigError(
            f"--profile={text}: expected a number of steps, at least 1, as --profile=3; leave it out to profile none"
        )
    return int(text)


def set_backends(config: configs.Config) -> None:
    """Process-wide switches of PyTorch that the config names."""
    import torch

    t = config.training
    if t.deterministic:  # read when cuBLAS starts; without it deterministic matrix products raise
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = t.tf32
    torch.backends.cudnn.allow_tf32 = t.tf32
    torch.backends.cudnn.benchmark = not t.deterministic
    torch.use_deterministic_algorithms(t.deterministic)
    if t.threads:
        torch.set_num_threads(t.threads)


def log_to(config: configs.Config, world: World) -> None:
    """Log lines to the terminal, around the progress bar, and to log.txt of the run."""
    from tqdm import tqdm

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not getattr(record, "on_bar", False):  # the bar shows it already
                tqdm.write(self.format(record))

    handlers: list[logging.Handler] = [Terminal()]
    if world.is_main:
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(config.run.dir) / "log.txt"))
    line = "%(asctime)s %(message)s" if world.size == 1 else f"%(asctime)s [rank {world.rank}] %(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, datefmt="%H:%M:%S", handlers=handlers, force=True)
    logging.getLogger("titanrepa").setLevel(logging.INFO)


def closing(config: configs.Config, step: int, complete: bool, path: str) -> str:
    """The last lines of a run: what there is, where, and what to do next."""
    folder = config.run.dir
    if not complete:
        return f"Stopped at step {step} of {config.training.steps}, saved in {folder}; run the same command to go on."
    return (
        f"Done: {step} steps. {folder}/ holds images/, checkpoints/, config.toml and log.txt; "
        f"curves and pictures: tensorboard --logdir {folder}/tensorboard"
    )
