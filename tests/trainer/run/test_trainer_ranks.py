"""Ranks act as one run: all respond to an event on any rank, and other ranks can resume a saved run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import torch

from components.checkpoint import CheckpointManager
from components.distributed.parallel import World
from tests.support import ROOT, toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

FP64 = ["--training.precision=fp64"]
# Weights that change visibly in every step.
PICTURES = [*FP64, "--training.steps=3", "--run.checkpoint_every=0", "--sampling.every=1", "--sampling.images=7",
            "--ema.decay=0.3", "--optimizer.lr=3e-3"]  # fmt: skip
SIGNALS = [int(signal.SIGTERM), int(signal.SIGUSR1)]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def make(rank: int, world: int, toml: str, folder: str, options: list[str]) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(config.load(toml, [f"--run.dir={folder}", *options]), World(rank, world))


def train(rank: int, world: int, toml: str, folder: str, options: list[str]) -> None:
    make(rank, world, toml, folder, options).run()


def numbers(folder) -> dict[int, dict[str, float]]:
    """All metrics by step except those of the machine; the last value counts for repeated steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("speed/", "time/", "memory/")
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith(machine)} for line in lines}


def assert_same(a, b) -> None:
    one, other = numbers(a), numbers(b)
    assert one.keys() == other.keys()
    for step in one:
        assert one[step].keys() == other[step].keys()
        for name in one[step]:
            assert one[step][name] == pytest.approx(other[step][name], rel=1e-8, abs=1e-10), f"step {step}: {name}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_saved_at_4_ranks_resumed_at_2_and_at_1(toml, tmp_path, optimizer):
    options = [*FP64, "--run.checkpoint_every=0", f"--optimizer.name={optimizer}"]
    train(0, 1, toml, str(tmp_path / "whole"), [*options, "--training.steps=3"])
    folder = str(tmp_path / "parts")
    run_ranks(
        train, 4, toml, folder, [*options, "--training.steps=1", "--parallel.strategy=hsdp", "--parallel.shard=2"]
    )
    run_ranks(train, 2, toml, folder, [*options, "--training.steps=2", "--parallel.strategy=ddp"])
    train(0, 1, toml, folder, [*options, "--training.steps=3"])
    assert_same(tmp_path / "whole", tmp_path / "parts")


def stopped_by_one(rank: int, world: int, toml: str, folder: str, number: int) -> tuple[int, int]:
    trainer = make(rank, world, toml, folder, ["--training.steps=50", "--run.checkpoint_every=0"])
    step = trainer.parts.recipe.step

    def stepped(m, batch, draws, update, k):
        if (rank, k) == (1, 2):
            os.kill(os.getpid(), number)
        step(m, batch, draws, update, k)

    trainer.parts.recipe.step = stepped
    trainer.lag = 1  # as on a GPU, where a step is read one step later
    trainer.run()
    return trainer.step, trainer.consumed


def slow_data(rank: int, world: int, toml: str, folder: str) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("titanrepa").addHandler(handler)
    trainer = make(rank, world, toml, folder, ["--training.steps=6", "--run.log_every=3", "--run.checkpoint_every=0"])
    if rank == 1:
        load = type(trainer.parts.dataset).__getitem__

        def slow(self, index):
            time.sleep(0.2)
            return load(self, index)

        type(trainer.parts.dataset).__getitem__ = slow
    trainer.run()
    return records


def all_of(rank: int, world: int, toml: str, folder: str) -> dict[str, Any]:
    """Run all cases in the same ranks, because a rank's first step is slow."""
    found = {f"signal {n}": stopped_by_one(rank, world, toml, f"{folder}/{n}", n) for n in SIGNALS}
    train(rank, world, toml, f"{folder}/pictures", PICTURES)
    return found | {"slow data": slow_data(rank, world, toml, f"{folder}/slow")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "toy.toml").write_text(toys.TOML)
    return folder, run_ranks(all_of, 2, str(folder / "toy.toml"), str(folder), timeout_s=300.0)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_on_one_rank_saves_and_stops_all_at_the_same_step(two_ranks, number):
    folder, found = two_ranks
    stopped = [f[f"signal {number}"] for f in found]
    assert stopped[0] == stopped[1]
    step = stopped[0][0]
    assert 3 <= step <= 6
    assert [p.name for p in (folder / str(number) / "checkpoints").iterdir()] == [f"step_{step:08d}"]


def test_the_rank_that_waits_for_data_is_named(two_ranks):
    records = two_ranks[1][0]["slow data"]
    assert any("rank 1 spends" in line and "waiting for data" in line for line in records), records
    assert not any("rank 0 spends" in line for line in records)


def test_pictures_on_the_way_are_those_of_one_process(two_ranks, tmp_path):
    """Weights are gathered for each picture again, and not kept for the next step."""
    folder, _ = two_ranks
    train(0, 1, str(folder / "toy.toml"), str(tmp_path / "one"), PICTURES)
    assert_same(tmp_path / "one", folder / "pictures")
    for kind in ("samples", "reconstructions"):
        before = None
        for step in (1, 2, 3):
            name = f"images/{kind}_{step:08d}.png"
            one, two = (image(run / name) for run in (tmp_path / "one", folder / "pictures"))
            difference = (one - two).abs()
            assert difference.max() <= 2 and (difference > 0).float().mean() < 0.01, name
            assert before is None or ((one - before).abs() > 2).float().mean() > 0.05, "the next step shows nothing new"
            before = one


def image(path: Path) -> torch.Tensor:
    with PIL.Image.open(path) as file:
        return torch.from_numpy(numpy.array(file)).int()


def test_the_rank_that_computes_slowly_is_named(toml, tmp_path, caplog):
    from trainer.run.report import Reporter

    reporter = Reporter(config.load(toml, [f"--run.dir={tmp_path / 'run'}"]), World(), ["denoiser"], 0)
    even = [[0.01, 0.010], [0.02, 0.011], [0.01, 0.012], [0.01, 0.010]]
    slow = [[0.01, 0.010], [0.02, 0.011], [0.01, 0.031], [0.01, 0.010]]
    for step, ranks in enumerate([even, slow, even, slow, slow, even]):
        reporter.name_stragglers(10 * step, ranks)
    reporter.close()
    (line,) = caplog.messages  # a single occurrence may be chance
    assert "step 40: rank 2 takes 3.1 times as long to compute as the median rank" in line


def test_a_full_disk_costs_a_warning_and_a_checkpoint_not_the_run(toml, tmp_path, caplog, monkeypatch):
    """The second of three periodic saves finds no space; the first stays complete, the third and last are written."""
    import shutil

    usage, calls = shutil.disk_usage, []

    def full_once(path):
        calls.append(path)
        return usage(path)._replace(free=1000) if len(calls) == 2 else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full_once)
    options = ["--recipe.name=ldm", "--training.steps=7", "--run.checkpoint_every=2", "--run.keep_checkpoints=9"]
    trainer = make(0, 1, toml, str(tmp_path / "run"), options)
    assert trainer.run()
    assert "could not be written" in caplog.text and "Training continues" in caplog.text
    kept = CheckpointManager(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept.candidates()] == ["step_00000007", "step_00000006", "step_00000002"]


def test_checkpoints_of_an_interval_stay_for_ever(toml, tmp_path):
    options = ["--recipe.name=ldm", "--training.steps=7", "--run.checkpoint_every=1", "--run.keep_checkpoints=1",
               "--run.keep_every=3"]  # fmt: skip
    make(0, 1, toml, str(tmp_path / "run"), options).run()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000007"]


def worker(launcher: int, rank: int) -> int:
    """A rank's process, somewhere below the launcher."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    for pid in parents:
        above = pid
        while above in parents and above != launcher:
            above = parents[above]
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if above == launcher and f"RANK={rank}".encode() in environment:
                return pid
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
def test_a_killed_rank_ends_the_others_and_the_restart_resumes(toml, tmp_path):
    options = ["--recipe.name=ldm", "--training.steps=10", *FP64, "--run.checkpoint_every=4",
               "--run.async_checkpoints=false"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NGPU": "2", "MAX_RESTARTS": "1"}
    environment["TMPDIR"] = str(tmp_path)
    command = [str(ROOT / "run_train.sh"), toml, f"--run.dir={tmp_path / 'run'}", *options]
    log = open(tmp_path / "output.txt", "w+")  # noqa: SIM115 (read while the process writes)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.05)
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        assert process.wait(timeout=180) == 0, Path(log.name).read_text()
    finally:
        process.kill()
        log.close()
    output = Path(log.name).read_text()
    # torchrun may restart before it has shown the last lines; its log files contain all of them.
    kept = "".join(path.read_text() for path in tmp_path.rglob("stderr.log"))
    # torchrun's SIGTERM may reach the other rank before it notices the loss.
    assert "lost another one" in kept or "interrupted (SIGTERM)" in kept, kept + output
    assert "resumed from" in output, kept + output
    train(0, 1, toml, str(tmp_path / "whole"), [*options, "--run.checkpoint_every=0"])
    assert_same(tmp_path / "whole", tmp_path / "run")
