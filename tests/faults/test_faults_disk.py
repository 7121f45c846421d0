"""A full disk costs a warning and what could not be written, never the run."""

import contextlib
import errno
import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from components.files.atomic import append_line
from tests.faults.test_faults_state import OPTIONS, checkpoints
from tests.support import toys
from trainer.__main__ import main
from trainer.run.loop import Trainer
from trainer.run.monitor.events import EventWriter

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def raises(*_, **__):
    raise FULL


def fill_tensorboard(monkeypatch):
    monkeypatch.setattr(EventWriter, "_write", raises)


def fill_metrics(monkeypatch):
    monkeypatch.setattr("trainer.run.report.append_line", raises)


def fill_images(monkeypatch):
    monkeypatch.setattr(Image.Image, "save", raises)
    monkeypatch.setattr("trainer.run.pictures.save_png", raises)


def fill_log(monkeypatch):
    from trainer.run import terminal

    original = terminal.LogFile.__init__

    def full(self, path, failed):
        original(self, "/dev/full", failed)

    monkeypatch.setattr(terminal.LogFile, "__init__", full)


@pytest.mark.parametrize(
    ("fill", "kind"),
    [
        (fill_tensorboard, "TensorBoard"),
        (fill_metrics, "metrics.jsonl"),
        (fill_images, "images/"),
        (fill_log, "log.txt"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_no_writer_of_reports_ends_a_run(toml, tmp_path, monkeypatch, capsys, fill, kind):
    fill(monkeypatch)
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS]) == 3
    output = capsys.readouterr()
    last = output.out.strip().splitlines()[-1]
    assert last.startswith("Problems: failed: ") and f"{kind} " in last
    assert output.out.count(f"{kind} failed: No space left on device") == 1, output
    assert checkpoints(tmp_path) == ["step_00000006"]


def test_an_alarm_that_cannot_be_written_is_logged(tmp_path, monkeypatch, caplog):
    from components.distributed.parallel import World
    from trainer import config
    from trainer.run.loop import Trainer

    (tmp_path / "toy.toml").write_text(toys.TOML)
    options = [f"--run.dir={tmp_path / 'run'}", *OPTIONS, "--guard.skipped=1", "--guard.policy=warn"]
    trainer = Trainer(config.load(str(tmp_path / "toy.toml"), options), World())
    step = trainer.parts.recipe.step
    trainer.parts.recipe.step = lambda m, b, random, u, k: step(m, b, random | {"noise": random["noise"] / 0}, u, k)
    monkeypatch.setattr("trainer.run.alarms.atomic_write", raises)
    assert trainer.run()
    assert "ALARM skipped at step 0" in caplog.text and trainer.troubles.failures == {"alarms/": 1}


def test_the_event_file_continues_in_a_new_file_when_there_is_space_again(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = EventWriter(tmp_path)
    writer.scalars({"a": 1.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer._records, "flush", raises)
        with pytest.raises(OSError, match="No space"):
            writer.scalars({"a": 2.0}, 2)
    writer.scalars({"a": 3.0}, 3)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {1, 3} <= {e.step for e in events.Scalars("a")}


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    import resource

    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError):
            append_line(path, '{"step": 2, "loss": 1.0}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_line(path, '{"step": 3}')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


@contextlib.contextmanager
def small_disk(path, mib: int):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_a_disk_that_is_full_does_not_end_training(toml, tmp_path, capsys, monkeypatch):
    """On a real file system, of which a file takes all that is left."""
    with small_disk(tmp_path / "disk", 100):
        run = tmp_path / "disk" / "run"
        command = ["train", toml, f"--run.dir={run}", "--recipe.name=ldm", "--sampling.every=2"]
        assert main([*command, "--training.steps=2"]) == 0
        capsys.readouterr()

        def fill(*_) -> None:
            with contextlib.suppress(OSError), open(tmp_path / "disk" / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        # Between the start, which needs room for the lock of the folder, and the first step.
        original = Trainer._prepare_folder
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_prepare_folder", lambda trainer: (original(trainer), fill()))
            status = main(command)
        output = capsys.readouterr()
        assert status == 2 and "the checkpoint of step 6 could not be written" in output.err, output
        assert "step 6 of 6" in output.out or "step 6 of 6" in output.err
        (tmp_path / "disk" / "ballast").unlink()
        assert main(command) == 0
