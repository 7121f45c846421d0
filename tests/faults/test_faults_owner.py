"""Two processes and one folder: the second is refused and changes nothing; a killed first one does not block."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.files.lock import NAME, owned
from tests.faults.test_faults_identity import content, image_folder
from tests.support import toys
from trainer.__main__ import main
from trainer.run.loop import Trainer

ROOT = Path(__file__).parents[2]
RECIPE = ["--recipe.name=ldm", "--training.threads=1", "--run.checkpoint_every=5"]


@pytest.fixture
def toml(tmp_path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("owner")
    (folder / "toy.toml").write_text(toys.TOML)
    assert main(["train", str(folder / "toy.toml"), f"--run.dir={folder / 'run'}", *RECIPE, "--training.steps=1"]) == 0
    return folder / "run"


def start(*words: str, before: tuple[str, ...] = ("-m", "trainer")) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *before, *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize("command", ["train", "sample", "encode", "export", "import", "evaluate"])
def test_every_command_that_writes_is_refused_in_a_folder_in_use(run, tmp_path, capsys, command):
    out, images = tmp_path / "out", image_folder(tmp_path / "images", {"x": 4})
    key, lock = "--out", out
    if command == "train":
        key, words = "run.dir", [run.parent / "toy.toml", f"--run.dir={out}", *RECIPE]
    elif command == "evaluate":
        key, lock = "--output", out / ".evaluation"
        words = [images, f"--reference={images}", "--encoder=tiny_vit", "--allow-singular", f"--output={out}/x.json"]
    elif command == "import":
        assert (
            main(["export", str(run), "--format=safetensors", f"--out={tmp_path / 'model'}", "--parts=tokenizer"]) == 0
        )
        words = [tmp_path / "model" / "tokenizer.safetensors", f"--config={run.parent}/toy.toml", f"--out={out}"]
    else:
        options = {"sample": ["--num-samples=2"], "export": ["--format=safetensors"]}.get(command, [])
        words = [run, f"--out={out}", *options]
    capsys.readouterr()
    with owned(lock, "test"):
        before = content(out)
        assert main([command, *map(str, words)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"error: {key} = '{lock}' is in use by pid {os.getpid()} on host "), last
        assert content(out) == before
    assert main([command, *map(str, words)]) == 0
    assert not list(tmp_path.rglob(f"{NAME}*"))


def test_readers_are_never_blocked(run, tmp_path):
    with owned(run, "run.dir"):
        assert main(["sample", str(run), "--num-samples=2", "--no-npz"]) == 0  # into its own folder in the run folder
        assert main(["encode", str(run), f"--out={tmp_path / 'cache'}"]) == 0
        with owned(tmp_path / "cache", "--out"):
            words = [f"--latent_cache.path={tmp_path / 'cache'}", "--training.num_classes=10"]
            assert main(["check", str(run.parent / "toy.toml"), *RECIPE, *words]) == 0


@pytest.mark.long
def test_a_second_training_is_refused_and_the_first_is_unharmed(toml, tmp_path):
    run = tmp_path / "run"
    words = ["train", toml, f"--run.dir={run}", *RECIPE, "--training.steps=5000"]
    first = start(*words)
    wait_for(run / "metrics.jsonl", first)
    second = start(*words)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and "Traceback" not in output
    assert f"error: run.dir = '{run}' is in use by pid {first.pid} on host " in output.strip().splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "repeat the command to resume" in output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert not (run / NAME).exists()


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_training_does_not_block_the_next(toml, tmp_path, ranks):
    run = tmp_path / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "trainer")
    before = torchrun if ranks > 1 else ("-m", "trainer")
    words = ["train", toml, f"--run.dir={run}", *RECIPE]
    first = start(*words, "--training.steps=5000", before=before)
    wait_for(run / "checkpoints" / "step_00000005" / "manifest.json", first)
    owner = json.loads((run / NAME).read_text())["pid"]
    os.kill(owner, signal.SIGKILL)
    first.communicate(timeout=120)
    assert (run / NAME).exists()
    second = start(*words, "--training.steps=20000" if ranks > 1 else "--training.steps=6", before=before)
    if ranks > 1:
        deadline = time.monotonic() + 120
        while json.loads((run / NAME).read_text())["pid"] == owner and time.monotonic() < deadline:
            assert second.poll() is None, second.stdout.read()
            time.sleep(0.05)
        third = start(*words, before=before)  # refused on both ranks, without a wait for each other
        output, _ = third.communicate(timeout=120)
        assert third.returncode != 0 and output.count("is in use by pid") == 2
        second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=120)
    assert f"took over the lock of pid {owner} " in output
    assert f"took over the lock of pid {owner} " in (run / "log.txt").read_text()


@pytest.mark.long
def test_a_run_whose_folder_was_taken_over_stops_without_another_checkpoint(toml, tmp_path, capsys, monkeypatch):
    """As after a suspension of minutes, in which another process went on with the run."""
    run = tmp_path / "run"
    micro_batches = Trainer._micro_batches

    def taken_over(trainer, *arguments):
        if trainer.step == 6:
            lock = json.loads((run / NAME).read_text())
            (run / NAME).write_text(json.dumps(lock | {"token": "another", "host": "elsewhere"}))
        return micro_batches(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_micro_batches", taken_over)
    assert main(["train", str(toml), f"--run.dir={run}", *RECIPE, "--training.steps=30"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: run.dir = '{run}': its lock was taken over by pid") and "elsewhere" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000005"]
    assert json.loads((run / NAME).read_text())["token"] == "another"
