"""Ranks as one run: what one of them meets, all of them act on; what some saved, others go on from."""

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

import pytest
import torch

from components.checkpoint import CheckpointManager
from components.parallel import World
from tests import toys
from tests.ranks import run_ranks
from trainer import config
from trainer.loop import Trainer

ROOT = Path(__file__).resolve().parents[1]
FP64 = ["--training.precision=fp64"]


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
    """Every metric by step, but for those that measure the machine; a repeated step counts last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines}


def assert_same(a, b) -> None:
    one, other = numbers(a), numbers(b)
    assert one.keys() == other.keys()
    for step in one:
        assert one[step].keys() == other[step].keys()
        for name in one[step]:
            assert one[step][name] == pytest.approx(other[step][name], rel=1e-8, abs=1e-10), f"step {step}: {name}"


def test_the_diffusion_loss_may_go_into_a_sharded_tokenizer(toml, tmp_path):
    """The recipe that sends it there backs through two sharded modules at once."""
    options = [*FP64, "--recipe.name=naive_e2e", "--training.steps=3"]
    run_ranks(train, 1, toml, str(tmp_path / "1"), options)
    run_ranks(train, 2, toml, str(tmp_path / "2"), options)
    assert_same(tmp_path / "1", tmp_path / "2")


def test_saved_at_4_ranks_resumed_at_2_and_at_1(toml, tmp_path):
    run_ranks(train, 1, toml, str(tmp_path / "whole"), [*FP64, "--training.steps=6"])
    folder = str(tmp_path / "parts")
    run_ranks(train, 4, toml, folder, [*FP64, "--training.steps=2", "--parallel.strategy=hsdp", "--parallel.shard=2"])
    run_ranks(train, 2, toml, folder, [*FP64, "--training.steps=4", "--parallel.strategy=ddp"])
    run_ranks(train, 1, toml, folder, [*FP64, "--training.steps=6"])
    assert_same(tmp_path / "whole", tmp_path / "parts")


def stopped_by_one(rank: int, world: int, toml: str, folder: str, number: int) -> tuple[int, int]:
    trainer = make(rank, world, toml, folder, ["--training.steps=50", "--run.checkpoint_every=0"])
    step = trainer.parts.recipe.step

    def stepped(m, batch, draws, update, k):
        if (rank, k) == (1, 2):
            os.kill(os.getpid(), number)
        step(m, batch, draws, update, k)

    trainer.parts.recipe.step = stepped
    trainer.lag = 1  # as on a GPU, where a step is read one later
    trainer.run()
    return trainer.step, trainer.consumed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_on_one_rank_saves_and_stops_all_at_the_same_step(toml, tmp_path, number):
    found = run_ranks(stopped_by_one, 2, toml, str(tmp_path / "run"), int(number))
    assert found[0] == found[1]
    step = found[0][0]
    assert 3 <= step <= 6
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:08d}"]


def slow_data(rank: int, world: int, toml: str, folder: str) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("titanrepa").addHandler(handler)
    trainer = make(rank, world, toml, folder, ["--training.steps=6", "--run.log_every=3"])
    if rank == 1:
        load = type(trainer.parts.dataset).__getitem__

        def slow(self, index):
            time.sleep(0.2)
            return load(self, index)

        type(trainer.parts.dataset).__getitem__ = slow
    trainer.run()
    return records


def test_the_rank_that_waits_for_data_is_named(toml, tmp_path):
    records = run_ranks(slow_data, 2, toml, str(tmp_path / "run"))[0]
    assert any("rank 1 spends" in line and "waiting for data" in line for line in records), records
    assert not any("rank 0 spends" in line for line in records)


def test_the_rank_that_computes_slowly_is_named(toml, tmp_path, caplog):
    from trainer.report import Reporter

    reporter = Reporter(config.load(toml, [f"--run.dir={tmp_path / 'run'}"]), World(), ["denoiser"], 0)
    even = [[0.01, 0.010], [0.02, 0.011], [0.01, 0.012], [0.01, 0.010]]
    slow = [[0.01, 0.010], [0.02, 0.011], [0.01, 0.031], [0.01, 0.010]]
    for step, ranks in enumerate([even, slow, even, slow, slow, even]):
        reporter.name_stragglers(10 * step, ranks)
    reporter.close()
    (line,) = caplog.messages  # once may be chance
    assert "step 40: rank 2 computes 3.1 times slower than the median rank" in line


def test_a_full_disk_costs_a_warning_and_a_checkpoint_not_the_run(toml, tmp_path, caplog, monkeypatch):
    """The second of three periodic saves finds no room; the first stays whole, the third and the last are written."""
    import shutil

    usage, calls = shutil.disk_usage, []

    def full_once(path):
        calls.append(path)
        return usage(path)._replace(free=1000) if len(calls) == 2 else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full_once)
    options = ["--training.steps=7", "--run.checkpoint_every=2", "--run.keep_checkpoints=9"]
    trainer = make(0, 1, toml, str(tmp_path / "run"), options)
    assert trainer.run()
    assert "could not be written" in caplog.text and "The run goes on" in caplog.text
    kept = CheckpointManager(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept.candidates()] == ["step_00000007", "step_00000006", "step_00000002"]


def test_checkpoints_of_an_interval_stay_for_ever(toml, tmp_path):
    options = ["--training.steps=7", "--run.checkpoint_every=1", "--run.keep_checkpoints=1", "--run.keep_every=3"]
    make(0, 1, toml, str(tmp_path / "run"), options).run()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000007"]


def worker(launcher: int, rank: int) -> int:
    """The process of a rank, somewhere below the launcher."""
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
    options = ["--training.steps=14", "--training.precision=fp64", "--run.checkpoint_every=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NGPU": "2", "MAX_RESTARTS": "1"}
    command = [str(ROOT / "run_train.sh"), toml, f"--run.dir={tmp_path / 'run'}", *options]
    log = open(tmp_path / "output.txt", "w+")  # noqa: SIM115 (read while the process writes)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.05)
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        assert process.wait(timeout=180) == 0, Path(log.name).read_text()
    finally:
        process.kill()
        log.close()
    output = Path(log.name).read_text()
    assert "lost another one" in output and "resumed from" in output, output
    run_ranks(train, 1, toml, str(tmp_path / "whole"), options)
    assert_same(tmp_path / "whole", tmp_path / "run")
