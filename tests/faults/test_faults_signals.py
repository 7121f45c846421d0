"""Signals mean the same in every command, at one process and at several, from the first import to the last save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT, toys
from trainer.signals import CAUGHT, Interrupted, Interruptions

pytestmark = pytest.mark.long

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
STARTED: list[subprocess.Popen] = []
LONG = ["--recipe.name=ldm", "--training.steps=5000", "--run.checkpoint_every=0"]


@pytest.fixture(autouse=True)
def none_left():
    """End what a failed test leaves running."""
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


class Process:
    """A process whose output goes to a file."""

    def __init__(self, folder: Path, *command: str, **env: str) -> None:
        self.file = folder / "output"
        with open(self.file, "wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=ENV | env)
        STARTED.append(self.process)

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 120
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < until, self.output
            time.sleep(0.01)

    def ends(self, number: int, within: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(within)


def trainer(folder: Path, *arguments: str) -> Process:
    return Process(folder, sys.executable, "-m", "trainer", *arguments)


@pytest.mark.parametrize("number", CAUGHT)
def test_during_imports_one_line_and_no_traceback(toml, tmp_path, number):
    # A module that begins like torch and takes long stands in for torch's imports.
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tqdm.py").write_text(
        "import sys, time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException as e:\n    raise ImportError('broken installation') from e\n"
    )
    process = Process(
        tmp_path, sys.executable, "-m", "trainer", "train", toml, f"--run.dir={tmp_path / 'run'}",
        PYTHONPATH=f"{tmp_path / 'slow'}:{ROOT}",
    )  # fmt: skip
    process.wait_for("importing")
    assert process.ends(number) == 128 + number
    assert process.output.split("importing")[1].strip() == (
        f"interrupted ({signal.Signals(number).name}); repeat the command to resume"
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_run_in_one_process_saves(toml, tmp_path, number):
    process = trainer(tmp_path, "train", toml, f"--run.dir={tmp_path / 'run'}", *LONG)
    process.wait_for("step 3 of")
    assert process.ends(number) == 0
    assert "repeat the command to resume" in process.output.splitlines()[-1]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_closed_terminal_does_not_prevent_the_save(toml, tmp_path):
    """SIGHUP from the terminal itself, after which every write to it fails."""
    import pty

    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", toml, f"--run.dir={tmp_path / 'run'}", *LONG],
        stdin=inside, stdout=inside, stderr=inside, cwd=ROOT, env=ENV, preexec_fn=lambda: own_terminal(inside),
    )  # fmt: skip
    os.close(inside)
    log = tmp_path / "run" / "log.txt"
    until = time.monotonic() + 120
    os.set_blocking(terminal, False)
    while not log.exists() or "step 3 of" not in log.read_text():
        assert process.poll() is None and time.monotonic() < until
        try:
            os.read(terminal, 100_000)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)
    assert process.wait(30) == 0
    assert "SIGHUP: finishing this step" in log.read_text() and "saved" in log.read_text().splitlines()[-2]


def own_terminal(inside: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(inside, termios.TIOCSCTTY, 0)


def test_nohup_stays_in_force(toml, tmp_path):
    process = Process(tmp_path, "nohup", sys.executable, "-m", "trainer", "train", toml,
                      f"--run.dir={tmp_path / 'run'}", *LONG)  # fmt: skip
    process.wait_for("step 3 of")
    process.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.process.poll() is None
    assert process.ends(signal.SIGTERM) == 0


# Saves for ever: the fsync of the second checkpoint does not return.
SLOW_SAVE = """
import sys, time
from components.files import manifest
from trainer.__main__ import main
original = manifest.checksum
def checksum(path, sync):
    if "step_00000002" not in str(path):
        print("saving for ever", flush=True)
        time.sleep(600)
    return original(path, sync)
manifest.checksum = checksum
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_while_saving_is_one_line(toml, tmp_path):
    options = [*LONG[:2], "--run.checkpoint_every=2", f"--run.dir={tmp_path / 'run'}"]
    process = Process(tmp_path, sys.executable, "-c", SLOW_SAVE, "train", toml, *options)
    process.wait_for("saving for ever")
    process.process.send_signal(signal.SIGINT)
    process.wait_for("SIGINT: finishing")
    assert process.ends(signal.SIGINT, within=5) == 130
    assert process.output.splitlines()[-1] == "interrupted again, ended at once; steps after 2 are lost"
    assert "Traceback" not in process.output
    again = [*options, "--training.steps=3"]
    again.remove("--training.steps=5000")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", toml, *again], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0 and "resumed from" in done.stdout and "at step 2" in done.stdout, done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of one step; read-only."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "toy.toml").write_text(toys.TOML)
    options = [f"--run.dir={folder / 'run'}", "--recipe.name=ldm", "--training.steps=1"]
    process = trainer(folder, "train", str(folder / "toy.toml"), *options)
    assert process.process.wait(120) == 0, process.output
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["sample", "encode", "evaluate"])
def test_other_commands_end_with_one_line(trained, tmp_path, command, number):
    words, begun = {
        "sample": (["--num-samples=3000", "--batch-size=4", "--steps=4", f"--out={tmp_path / 'out'}"], "000009.png"),
        "encode": (
            ["--dataset.size=100000", f"--out={tmp_path / 'out'}", "--batch-size=4", "--shard-size=8"],
            "00003.json",
        ),
        "evaluate": (
            ["--reconstruction", "--metrics=psnr,ssim", "--dataset.size=100000", f"--output={tmp_path}/out/a.json"],
            "*",
        ),
    }[command]
    words.insert(0, str(trained))
    if command == "evaluate":
        (tmp_path / "out").mkdir()
    process = trainer(tmp_path, command, *words)
    until = time.monotonic() + 120
    while not any((tmp_path / "out").rglob(begun)):
        assert process.process.poll() is None and time.monotonic() < until, process.output
        time.sleep(0.02)
    assert process.ends(number, within=10) == 128 + number
    last = process.output.strip().splitlines()[-1]
    assert last == f"interrupted ({signal.Signals(number).name}); repeat the command to resume"
    assert "Traceback" not in process.output


# -- several processes ----------------------------------------------------------------------------------------------


def launched(folder: Path, toml: str, *options: str, processes: int = 2) -> Process:
    return Process(
        folder, "./run_train.sh", toml, f"--run.dir={folder / 'run'}", *options,
        NGPU=str(processes), PYTHON=sys.executable, TMPDIR=str(folder),
    )  # fmt: skip


def test_a_batch_that_the_processes_cannot_divide_is_one_message_with_status_2(toml, tmp_path):
    process = launched(tmp_path, toml, "--training.batch_size=32", processes=3)
    assert process.process.wait(120) == 2
    lines = [line for line in process.output.splitlines() if "titanrepa 0" not in line]
    assert len(lines) == 1 and "error: training.batch_size = 32: not divisible by 3 ranks" in lines[0], process.output
    assert not list(tmp_path.glob("titanrepa.*"))


@pytest.mark.parametrize("text", ["", "titanrepa 0"])
def test_a_signal_before_the_first_step_of_two_processes_is_one_line(toml, tmp_path, text):
    process = launched(tmp_path, toml, *LONG)
    if text:
        process.wait_for(text)
    else:
        time.sleep(1)
    assert process.ends(signal.SIGTERM, within=30) == 143
    lines = [line for line in process.output.splitlines() if line.strip("[]:rank0") and "titanrepa 0" not in line]
    assert len(lines) == 1 and "interrupted (SIGTERM); repeat the command to resume" in lines[0], process.output


def test_two_processes_save_on_sighup(toml, tmp_path):
    process = launched(tmp_path, toml, *LONG)
    process.wait_for("step 3 of")
    assert process.ends(signal.SIGHUP, within=60) == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


# -- the mechanism --------------------------------------------------------------------------------------------------


def test_signals_raise_once_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in CAUGHT]
    with Interruptions("hint") as interruptions, pytest.raises(Interrupted) as error:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    assert interruptions.number == signal.SIGUSR1 and "SIGUSR1" in str(error.value)
    assert [signal.getsignal(number) for number in CAUGHT] == before


def test_a_process_that_cannot_react_is_ended(tmp_path):
    code = (
        "import threading\nfrom trainer import signals\nsignals.GRACE_S = 0.2\n"
        "with signals.Interruptions():\n    print('ready', flush=True)\n"
        "    while True:\n        try:\n            threading.Event().wait()\n        except BaseException: pass\n"
    )
    process = Process(tmp_path, sys.executable, "-c", code)
    process.wait_for("ready")
    assert process.ends(signal.SIGTERM, within=5) == 143
    assert "interrupted (SIGTERM) (ended after 0.2 s without an answer)" in process.output


def test_windows_is_told_what_is_needed():
    code = "import os; os.name = 'nt'; import trainer.signals"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("runs on Linux and macOS; on Windows, use WSL 2")
