"""Runs as a user starts them: train, stop, resume and restart, with the numbers of an uninterrupted run."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components import registry
from components.distributed.parallel import World
from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.run.loop import Trainer


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def train(toml: str, folder: Path, *overrides: str) -> Trainer:
    trainer = Trainer(config.load(toml, [f"--run.dir={folder}", *overrides]), World())
    trainer.run()
    return trainer


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    """All metrics of every step except those of the machine; the last value counts for repeated steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("speed/", "time/", "memory/")
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith(machine)} for line in lines}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = numbers(a), numbers(b)
    assert first.keys() == second.keys()
    for step in first:
        assert first[step] == second[step], f"step {step}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run of six steps; read-only."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "toy.toml").write_text(toys.TOML)
    train(str(folder / "toy.toml"), folder / "run", "--run.keep_checkpoints=2")
    return folder / "run"


def test_resumed_equals_uninterrupted_bit_for_bit(toml, tmp_path, whole):
    """Resumes between two epochs; test_a_damaged_checkpoint_is_skipped... resumes within one."""
    train(toml, tmp_path / "parts", "--training.steps=5", "--run.checkpoint_every=0")
    resumed = train(toml, tmp_path / "parts", "--run.checkpoint_every=0")
    assert resumed.step == 6
    assert_same_run(whole, tmp_path / "parts")
    other = Trainer(config.load(toml, [f"--run.dir={whole}"]), World())
    other.resume()
    assert_same_state(other.state(), resumed.state())


@pytest.mark.long
def test_muon_resumes_bit_for_bit_and_takes_the_settings_of_the_config(toml, tmp_path):
    muon = ["--optimizer.name=muon", "--optimizer.adamw_lr=3e-4", "--run.checkpoint_every=0"]
    muon += ["--optimizer.schedule=piecewise", "--optimizer.points=[[1, 1.0], [5, 0.2]]"]
    whole = train(toml, tmp_path / "whole", *muon, "--training.steps=4")
    train(toml, tmp_path / "parts", *muon, "--training.steps=2")
    resumed = train(toml, tmp_path / "parts", *muon, "--training.steps=4")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(whole.state(), resumed.state())
    assert [line["lr/denoiser"] / 1e-4 for line in numbers(tmp_path / "whole").values()] == pytest.approx(
        [1, 1, 0.8, 0.6]
    )
    changed = train(toml, tmp_path / "parts", *muon, "--optimizer.momentum=0.5", "--training.steps=5")
    assert changed.step == 5
    assert [group.get("momentum") for group in changed.groups["denoiser"].optimizer.param_groups] == [0.5, None]


def assert_same_state(a: dict, b: dict) -> None:
    assert a["progress"] == b["progress"]
    for kind in ("modules", "ema", "optimizers"):
        for name in a[kind]:
            for key, value in a[kind][name].items():
                same = value.equal(b[kind][name][key]) if hasattr(value, "equal") else value == b[kind][name][key]
                assert same, f"{kind} {name} {key}"


@pytest.mark.parametrize("recipe", ["repa", "ldm", "naive_e2e", "tokenizer"])
@pytest.mark.long
def test_every_recipe_trains_and_resumes(toml, tmp_path, recipe):
    options = [f"--recipe.name={recipe}", "--training.steps=2", "--run.checkpoint_every=1"]
    train(toml, tmp_path / "run", *options)
    first = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(toml, tmp_path / "run", *options)
    assert numbers(tmp_path / "run") == {2: first[2]}


def test_several_encoders_have_a_head_each(toml, tmp_path):
    """A label names a table and `name` selects the plugin, so one plugin may be used twice."""
    options = ["--training.steps=1", "--encoders.second.name=tiny_vit"]
    trainer = train(toml, tmp_path / "run", *options)
    assert list(trainer.parts.modules.encoders) == ["tiny_vit", "second"] and len(trainer.parts.modules.heads) == 2
    grads = [sum(p.abs().sum() for p in head.parameters()) for head in trainer.parts.modules.heads]
    assert grads[0] != grads[1]


@pytest.mark.long
def test_accumulation_sees_the_same_images_and_draws(toml, tmp_path):
    """`ldm` has no batch norm that depends on the micro-batch: two micro-batches of 4 equal one batch of 8."""
    options = ["--recipe.name=ldm", "--training.precision=fp64", "--training.steps=3", "--run.checkpoint_every=0"]
    train(toml, tmp_path / "one", *options)
    train(toml, tmp_path / "two", *options, "--training.accumulation=2")
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for step in one:
        for name in ("denoiser/velocity", "grad_norm/denoiser"):
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-9)


def test_a_finished_run_says_so_and_changes_nothing(toml, tmp_path, caplog):
    options = ["--recipe.name=ldm", "--training.steps=2"]
    train(toml, tmp_path / "run", *options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}
    with caplog.at_level("INFO", logger="titanrepa"):
        train(toml, tmp_path / "run", *options)
    assert "already complete: step 2 of 2" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")}


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(toml, tmp_path, caplog, whole):
    train(toml, tmp_path / "run", "--training.steps=4")
    damaged = next((tmp_path / "run" / "checkpoints" / "step_00000004").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    train(toml, tmp_path / "run")
    assert "skipping checkpoint" in caplog.text and f"step_00000004: {damaged.name}" in caplog.text
    assert_same_run(whole, tmp_path / "run")


def test_a_checkpoint_of_another_architecture_is_refused(toml, tmp_path):
    from components.checkpoint import CheckpointError

    train(toml, tmp_path / "run", "--training.steps=2")
    with pytest.raises(CheckpointError, match=r"modules\.denoiser"):
        train(toml, tmp_path / "run", "--denoiser.width=64")


def test_what_a_run_folder_holds(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = whole
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert {p.name for p in (folder / "images").iterdir()} == {
        "reconstructions_00000006.png",
        "samples_00000006.png",
    }
    assert config.load(str(folder / "config.toml")).training.steps == 6
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    for name in ("l1", "kl", "gan", "align", "loss"):
        assert f"tokenizer/{name}" in tags["scalars"]
    for name in ("discriminator/hinge", "denoiser/velocity", "denoiser/align", "grad_norm/denoiser", "lr/tokenizer",
                 "speed/images_per_s", "samples/judged_right", "data/unreadable"):  # fmt: skip
        assert name in tags["scalars"]
    assert set(tags["images"]) == {"reconstructions", "samples"} and "config/text_summary" in tags["tensors"]
    assert [e.step for e in events.Scalars("tokenizer/l1")] == [1, 2, 3, 4, 5, 6]


def start(toml: str, folder: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", toml, f"--run.dir={folder}", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


@pytest.mark.long
def test_a_signal_saves_and_the_same_command_goes_on(toml, tmp_path, capsys):
    """Ctrl-C in the terminal, then the end of a job, then on to the end of the run."""
    options = ["--recipe.name=ldm", "--training.steps=500", "--run.checkpoint_every=0", "--training.threads=1"]
    stopped = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(toml, tmp_path / "run", *options, "--training.deterministic")
        wait_for_step(tmp_path / "run", stopped + 3, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "repeat the command to resume" in output and "Traceback" not in output
        assert not stopped or f"at step {stopped}" in output
        stopped = len(numbers(tmp_path / "run"))
        names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
        assert f"step_{stopped:08d}" in names and len(names) <= 2

    again = [o.replace("=500", f"={stopped + 1}") for o in options]
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *again]) == 0
    assert len(numbers(tmp_path / "run")) == stopped + 1
    output = capsys.readouterr()
    assert "tensorboard --logdir" in (output.err + output.out).strip().splitlines()[-1], output


@pytest.mark.long
def test_kill_9_loses_no_complete_checkpoint(toml, tmp_path):
    options = ["--recipe.name=ldm", "--training.steps=500", "--run.checkpoint_every=1", "--training.threads=1"]
    process = start(toml, tmp_path / "run", *options)
    wait_for_step(tmp_path / "run", 4, process)
    process.kill()
    process.communicate()
    reached = len(numbers(tmp_path / "run"))
    trainer = Trainer(config.load(toml, [f"--run.dir={tmp_path / 'run'}", *options]), World())
    assert trainer.resume() and trainer.step >= reached - 2


def test_each_network_is_constructed_once_a_start(toml, monkeypatch):
    """Including the recipe; validation, FLOP counting and averages use the same objects or copies of them."""
    made: list[str] = []
    for kind in registry.KINDS.values():
        for plugin in kind:

            def counted(self, *given, cls=plugin.cls, make=plugin.cls.__init__, **options):
                if type(self) is cls:
                    made.append(cls.__name__)
                make(self, *given, **options)

            monkeypatch.setattr(plugin.cls, "__init__", functools.wraps(plugin.cls.__init__)(counted))
    Trainer(config.load(toml), World())
    assert sorted(made) == sorted(
        ["RepaE", "AutoencoderKL", "SiT", "TinyViT", "L1", "KL", "PatchGAN", "Cosine", "Shapes"] + 3 * ["AdamW"]
    )
