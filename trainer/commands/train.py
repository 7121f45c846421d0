"""python -m trainer train: start or resume the run of a config."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from components.version import versions
from trainer import config as configs
from trainer.launch.settings import STATUS_FILE
from trainer.startup import without_garbage_collection

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from components.distributed.parallel import World
    from trainer.run.troubles import Troubles

DOUBTFUL = 3  # exit status of a complete run that something was wrong with to the end
STATUSES = """Exit status:
  0    complete, or stopped by a signal with the reached step saved
  1    an unexpected error, with its traceback
  2    an error that the message explains; also a run that the guard stopped
  3    complete, but with problems, as the last line says: the last steps were skipped because a value was not
       finite, an alarm lasts, or a checkpoint, picture, evaluation or log could not be written
  128 + n  ended by signal n before the first step or at once: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1
After an error the reached step is saved if the state in memory is sound.

On a CPU with glibc, freed memory is kept for reuse; TITANREPA_KEEP_MEMORY=0 or any MALLOC_* variable prevents it."""
PROFILED = 3  # steps, if --profile has no value

SUMMARY = "train from a TOML config; repeat the command to resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file, e.g. train_configs/quickstart.toml")
    parser.add_argument(
        "--profile",
        nargs="?",
        const=PROFILED,
        metavar="STEPS",
        help=f"record STEPS steps (default: {PROFILED}) with PyTorch's profiler, into profile/ of the run folder; "
        "[profile] in the config sets when, and whether to record GPU memory",
    )
    parser.add_argument(
        "--accept-classes",
        action="store_true",
        help="resume although the names or the order of the dataset's classes differ from those of the checkpoint",
    )
    parser.epilog = f"Any config key can be overridden: --section.key=value\n\n{STATUSES}\n\n{configs.describe()}"


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.profile is not None:
        overrides = [*overrides, f"--profile.steps={profiled_steps(arguments.profile)}"]
    config = configs.load(arguments.config, overrides)
    from components.distributed import parallel
    from trainer.run.run_log import end_run_log
    from trainer.run.troubles import Troubles

    world = parallel.join_world(config.parallel.timeout_s)
    try:
        from components.distributed.ranks import Ranks
        from components.files.lock import owned

        set_backends(config)
        troubles = Troubles()
        log_to(config, world, troubles)
        with owned(config.run.dir, "run.dir", Ranks(None).first):
            return train(arguments, config, world, troubles)
    finally:
        end_run_log()
        parallel.leave_world()


def train(arguments: argparse.Namespace, config: configs.Config, world: World, troubles: Troubles) -> int:
    """Train on one rank, in a run folder that rank 0 owns; returns the exit status."""
    from components.distributed import parallel
    from trainer.run.terminal import surviving

    if world.is_main:
        logging.getLogger("titanrepa").info(versions())
    with without_garbage_collection():
        from trainer.run.loop import Trainer

    trainer = Trainer(config, world, troubles, accept_classes=arguments.accept_classes)
    if world.is_main:
        for place in trainer.parts.unused:
            logging.getLogger("titanrepa").info(f"recipe '{config.recipe.name}' does not use [{place}]")
    with parallel.lost_rank_named(lambda: f"at step {trainer.step}"):
        complete = trainer.run()
    counts = parallel.gather_floats(trainer.unreadable.count, trainer.unreadable.seen)
    found = troubles.summary(trainer.step, *(int(sum(of_ranks)) for of_ranks in zip(*counts)))
    if world.is_main:
        with surviving():
            print(closing(config, trainer.step, complete, found), flush=True)
    doubtful = troubles.failures or troubles.skipped_since or trainer.watch.guard.lasting()
    return exit_status(DOUBTFUL if complete and doubtful else 0)


def profiled_steps(text: str | int) -> int:
    """Number of steps in ``--profile=text``; ConfigError if it is not a positive integer."""
    if not str(text).isdecimal() or int(text) < 1:
        raise configs.ConfigError(
            f"--profile={text}: expected a number of steps, at least 1, e.g. --profile=3; omit it for no profile"
        )
    return int(text)


@without_garbage_collection()  # use_deterministic_algorithms imports torch._dynamo
def set_backends(config: configs.Config) -> None:
    """Set process-wide switches: TF32, determinism, cuDNN benchmark and threads as configured; glibc's allocator."""
    import torch

    from trainer.run.allocator import keep_freed_memory

    t = config.training
    if t.deterministic:  # read when cuBLAS initializes; deterministic matrix products raise without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = t.tf32
    torch.backends.cudnn.allow_tf32 = t.tf32
    torch.backends.cudnn.benchmark = not t.deterministic
    torch.use_deterministic_algorithms(t.deterministic)
    if t.threads:
        torch.set_num_threads(t.threads)
    if not torch.cuda.is_available():
        keep_freed_memory()


def log_to(config: configs.Config, world: World, troubles: Troubles | None = None) -> None:
    """Send log lines to the terminal, without breaking the progress bar, and to log.txt in the run folder."""
    from trainer.run.run_log import RunLog
    from trainer.run.terminal import Terminal
    from trainer.run.troubles import Troubles

    failed = functools.partial((troubles or Troubles()).failed, "log.txt")
    handlers: list[logging.Handler] = [Terminal()]
    if world.is_main:
        handlers.append(RunLog(Path(config.run.dir) / "log.txt", failed))
    line = "%(asctime)s %(message)s" if world.size == 1 else f"%(asctime)s [rank {world.rank}] %(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, datefmt="%H:%M:%S", handlers=handlers, force=True)
    logging.getLogger("titanrepa").setLevel(logging.INFO)


def closing(config: configs.Config, step: int, complete: bool, found: list[str]) -> str:
    """Last message of a run: what it wrote, where, and the next step; then what was wrong with it, if anything."""
    folder, wrong = config.run.dir, f"\nProblems: {'; '.join(found)}." if found else ""
    if not complete:
        steps = config.training.steps
        return f"Stopped at step {step} of {steps}, saved in {folder}; repeat the command to resume.{wrong}"
    return (
        f"Done: {step} steps. {folder}/ holds images/, checkpoints/, config.toml and log.txt; "
        f"curves and images: tensorboard --logdir {folder}/tensorboard{wrong}"
    )


def exit_status(status: int) -> int:
    """Exit status of this process.

    run_train.sh names a file for a status other than 0 of a complete run: torchrun would take that for a failure, and
    start the processes again.
    """
    if status and (file := os.environ.get(STATUS_FILE)):
        Path(file).write_text(str(status))
        return 0
    return status
