"""`train --profile` writes files for Perfetto and TensorBoard, however the run ends."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from components.distributed.parallel import World
from components.monitor.phases import PhaseClock
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.commands.train import profiled_steps
from trainer.config import ConfigError
from trainer.run.loop import Trainer
from trainer.run.monitor.profiling import Profiler

pytestmark = pytest.mark.long

PHASES = {"data", "encoders", "tokenizer", "discriminator", "denoiser", "optimizer"}


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def make(toml: str, folder: Path, *overrides: str) -> Trainer:
    options = [f"--run.dir={folder}", "--run.checkpoint_every=0", *overrides]
    trainer = Trainer(config.load(toml, options), World())
    trainer.checkpoints.save = lambda step: None
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("profile/*"))


def ranges(path: Path) -> list[str]:
    """Ranges of a trace, in order of time."""
    with gzip.open(path) as file:
        found = [e for e in json.load(file)["traceEvents"] if e.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_a_trace_of_the_steps_asked_for_with_their_phases(toml, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = make(toml, tmp_path / "run", "--profile.steps=2", "--profile.first=2", "--sampling.every=2")
    assert trainer.run()
    assert names(tmp_path / "run") == ["rank0_steps_3-4.pt.trace.json.gz", "rank0_steps_3-4_operators.txt"]
    found = ranges(tmp_path / "run" / "profile" / "rank0_steps_3-4.pt.trace.json.gz")
    assert [name for name in found if name.startswith("ProfilerStep")] == ["ProfilerStep#1", "ProfilerStep#2"]
    assert set(found) >= PHASES and found.count("encoders") == 2
    assert "aten::" in (tmp_path / "run" / "profile" / "rank0_steps_3-4_operators.txt").read_text()
    assert "profiled steps 3 to 4" in caplog.text and "ui.perfetto.dev" in caplog.text
    assert not trainer.clock.ranges


def test_a_run_without_it_writes_nothing(toml, tmp_path):
    trainer = make(toml, tmp_path / "run", "--recipe.name=ldm", "--training.steps=2")
    trainer.run()
    assert trainer.profiler is None and not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize(
    ("left", "expected"), [(20, "11-13"), (12, "10-12"), (5, "3-5"), (3, "1-3"), (2, "1-2"), (1, "1-1")]
)
def test_the_window_moves_into_what_is_left_of_a_run(tmp_path, left, expected):
    clock = PhaseClock(torch.device("cpu"))
    where = {"folder": tmp_path / "profile", "world": World(), "clock": clock}
    profiler = Profiler(steps=3, first=10, memory=True, left=left, **where)
    for step in range(left):
        profiler.before(step)
        torch.ones(3).sum()
        profiler.after()
    profiler.close()
    assert names(tmp_path) == [f"rank0_steps_{expected}.pt.trace.json.gz", f"rank0_steps_{expected}_operators.txt"]


def test_a_resumed_run_profiles_its_own_steps(toml, tmp_path):
    options = ["--recipe.name=ldm", "--profile.steps=1", "--profile.first=1"]
    for steps in (3, 6):
        trainer = Trainer(config.load(toml, [f"--run.dir={tmp_path}", f"--training.steps={steps}", *options]), World())
        trainer.run()
    assert names(tmp_path)[::2] == ["rank0_steps_2-2.pt.trace.json.gz", "rank0_steps_5-5.pt.trace.json.gz"]


def test_a_stop_within_the_window_writes_what_there_is(toml, tmp_path):
    trainer = make(toml, tmp_path, "--recipe.name=ldm", "--profile.steps=5", "--profile.first=1", "--training.steps=50")
    step = trainer.parts.recipe.step

    def stepped(m, batch, draws, update, k):
        trainer.signals.requested |= k == 2
        step(m, batch, draws, update, k)

    trainer.parts.recipe.step = stepped
    assert not trainer.run() and trainer.step == 4, "the step after the signal tells the others"
    assert names(tmp_path)[0] == "rank0_steps_2-4.pt.trace.json.gz"


def test_ctrl_c_a_second_time_writes_what_there_is(toml, tmp_path):
    trainer = make(toml, tmp_path, "--recipe.name=ldm", "--profile.steps=5", "--profile.first=1", "--training.steps=50")
    step = trainer.parts.recipe.step

    def stepped(m, batch, draws, update, k):
        if k == 3:
            raise KeyboardInterrupt
        step(m, batch, draws, update, k)

    trainer.parts.recipe.step = stepped
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert len(names(tmp_path)) == 2


def test_an_end_while_warming_up_writes_nothing(tmp_path):
    clock = PhaseClock(torch.device("cpu"))
    where = {"folder": tmp_path / "profile", "world": World(), "clock": clock}
    profiler = Profiler(steps=3, first=2, memory=True, left=20, **where)
    for step in range(2):
        profiler.before(step)
        profiler.after()
    assert clock.ranges
    profiler.close()
    assert names(tmp_path) == [] and not clock.ranges


@pytest.mark.parametrize(
    ("flag", "steps"),
    [(["--profile"], 3), (["--profile=7"], 7), (["--profile", "7"], 7), (["--profile.steps=4"], 4), ([], 0)],
)
def test_the_flag_says_how_many_steps(toml, flag, steps, monkeypatch):
    class Seen(Exception):
        pass

    def load(path, overrides):
        raise Seen(real(path, overrides).profile.steps)

    real = config.load
    monkeypatch.setattr(config, "load", load)
    with pytest.raises(Seen) as seen:
        main(["train", toml, *flag])
    assert seen.value.args == (steps,)


@pytest.mark.parametrize("text", ["0", "-1", "x", "2.5", ""])
def test_what_is_no_number_of_steps_is_refused(toml, text, capsys):
    assert main(["train", toml, f"--profile={text}"]) == 2
    assert f"--profile={text}: expected a number of steps, at least 1" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        profiled_steps(text)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("memory", [True, False])
def test_a_gpus_memory_is_recorded_where_asked(toml, tmp_path, memory):
    options = [f"--run.dir={tmp_path}", "--recipe.name=ldm", "--profile.steps=2"]
    options.append(f"--profile.memory={str(memory).lower()}")
    Trainer(config.load(toml, options), World(device=torch.device("cuda", 0))).run()
    assert len(names(tmp_path)) == 2 + memory
    for path in tmp_path.glob("profile/*.pickle"):
        assert os.path.getsize(path) > 1000


def test_files_that_cannot_be_written_do_not_cost_the_run(toml, tmp_path, caplog):
    trainer = make(toml, tmp_path, "--recipe.name=ldm", "--profile.steps=1", "--training.steps=3")
    (tmp_path / "profile").write_text("a file, not a folder")
    assert trainer.run()
    assert "the profile could not be written" in caplog.text
