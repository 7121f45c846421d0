"""Training steps of this version beside those of another one: the speed gained since a commit.

Each version runs `python -m trainer train` in a process of its own, whole: data, steps, metrics, guard and log. The
processes stop between two steps and go on in turns.

    python benchmarks/against.py COMMIT CONFIG --rounds=7 --steps=20 [--section.key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = "--worker"
# No pictures and checkpoints between the steps.
STEPS_ONLY = ("--training.steps=1000000", "--run.checkpoint_every=0", "--sampling.every=0")


class Version:
    """A training run of the code in ``folder`` that takes steps on command.

    Args:
        folder: checkout of the project.
        arguments: of `trainer train`, with a ``run.dir`` of its own.
        log: file for the run's output, which an error message quotes.

    Raises:
        RuntimeError: (also :meth:`steps`) the run has ended.
    """

    def __init__(self, folder: Path, arguments: list[str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, WORKER, "train", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            start_new_session=True,  # the data's workers end with it
        )
        self._answer()

    def steps(self, count: int) -> tuple[float, float]:
        """Take steps; returns milliseconds per step: by the clock, and of the CPU (all threads, no data workers)."""
        with contextlib.suppress(BrokenPipeError):  # the answer says so
            print(count, file=self.process.stdin, flush=True)
        wall, cpu = self._answer()
        return wall / count * 1e3, cpu / count * 1e3

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the run has ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)


def worker(arguments: list[str]) -> Any:
    """Train in the current folder's version; before each step of which none is left, wait for their number on stdin."""
    sys.path[0] = os.getcwd()  # not this file's folder
    answers, commands = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    import torch

    name = "trainer.run.step" if Path("trainer/run").is_dir() else "trainer.step"
    step_class = importlib.import_module(name).Step
    call, left, begin = step_class.__call__, 0, (time.perf_counter(), time.process_time())

    def on_command(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal left, begin
        if left == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter(), time.process_time()
            print(json.dumps([b - a for a, b in zip(begin, now)]), file=answers)
            left = int(commands.readline() or sys.exit())
            begin = time.perf_counter(), time.process_time()
        left -= 1
        return call(self, *args, **options)

    step_class.__call__ = on_command
    return importlib.import_module("trainer.__main__").main(arguments)


def checkout(version: str, folder: Path) -> Path:
    """Folder of a version: ``version`` itself if it is one, otherwise ``folder`` with the files of that commit."""
    if Path(version).is_dir():
        return Path(version).resolve()
    folder.mkdir()
    archive = subprocess.run(["git", "archive", version], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time the training steps of this version and of another one, alternating, in two processes.",
        epilog="Any config key of both versions can be overridden: --section.key=value",
        allow_abbrev=False,
    )
    parser.add_argument("version", help="commit to compare with, or a folder that holds another version")
    parser.add_argument("config", help="TOML file; each version reads its own, relative to its root")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements (default: 7)")
    parser.add_argument("--steps", type=int, default=20, help="steps per measurement (default: 20)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed steps of each version (default: 10)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    a, overrides = parser.parse_known_args(argv)
    versions: dict[str, Version] = {}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        try:
            for name, folder in (("this", ROOT), ("other", checkout(a.version, here / "checkout"))):
                arguments = [a.config, *STEPS_ONLY, f"--run.dir={here / name}", *overrides]
                versions[name] = Version(folder, arguments, here / f"{name}.log")
                versions[name].steps(a.warmup)
            rounds = [{name: version.steps(a.steps) for name, version in versions.items()} for _ in range(a.rounds)]
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            for version in versions.values():
                version.end()
    found: dict[str, Any] = {"version": a.version, "config": a.config, "overrides": overrides, "steps": a.steps}
    for index, kind in enumerate(("ms per step", "CPU ms per step")):
        pairs = [(pair["other"][index], pair["this"][index]) for pair in rounds]
        other, this = (median(values) for values in zip(*pairs))
        ratios = [round(other / this, 3) for other, this in pairs]
        found[kind] = {"other": round(other, 2), "this": round(this, 2), "ratios": ratios, "ratio": median(ratios)}
        print(
            f"{kind}: {a.version} {other:.1f}, this {this:.1f}; ratio {median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) over {a.rounds} alternating pairs of {a.steps} steps"
        )
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == [WORKER] else main())
