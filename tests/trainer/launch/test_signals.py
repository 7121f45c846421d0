"""run_train.sh on a signal: the workers finish the step, save and exit; torchrun ignores the signal."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support.script_stubs import Repository, wait_for

pytestmark = pytest.mark.long


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


# Like torchrun: workers in separate sessions, and any signal kills it. In Python, because a shell started in the
# background cannot trap SIGINT.
LAUNCHER = f"""#!{sys.executable}
import os, signal, subprocess, sys

def die(*_):
    with open(os.environ["LOG"], "a") as log:
        log.write("launcher signalled\\n")
    os._exit(9)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, die)
worker = ["bash", __file__ + ".worker"]
if os.environ.get("WORKERS") == "0":
    with open(os.environ["LOG"], "a") as log:
        log.write("launcher ready\\n")
    signal.pause()
for attempt in range(1 + int(os.environ["RESTARTS"])):
    workers = [subprocess.Popen([*worker, str(i)], start_new_session=True) for i in range(2)]
    status = max(abs(w.wait()) for w in workers)
    if status == 0:
        break
sys.exit(status)
"""
WORKER = """
echo $$ >>"$LOG.pids"
trap 'echo "worker $1 saves" >>"$LOG"; sleep "$SAVING"; echo "worker $1 saved" >>"$LOG"; exit "$STATUS"' TERM
echo "worker $1 ready" >>"$LOG"
while :; do sleep 0.02; done
"""


@pytest.fixture
def launch(repo, tmp_path):
    """Start run_train.sh on its own terminal, with torchrun's stub and two workers; kill the remaining processes."""
    (tmp_path / "launcher").write_text(LAUNCHER)
    (tmp_path / "launcher").chmod(0o755)
    (tmp_path / "launcher.worker").write_text(WORKER)
    started = []

    def start(
        saving: float = 0.1, status: int = 0, restarts: int = 0, ignored: tuple = (), **extra
    ) -> tuple[subprocess.Popen, int]:
        terminal, inside = pty.openpty()

        def own_terminal():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                # What pytest was started with ignored would stay so.
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN if signal.SIGCHLD in ignored else signal.SIG_DFL)
            os.setsid()
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

        env = repo.environment(
            NGPU="2",
            LAUNCHER=str(tmp_path / "launcher"),
            TMPDIR=str(tmp_path),
            SAVING=str(saving),
            STATUS=str(status),
            RESTARTS=str(restarts),
            **extra,
        )
        process = subprocess.Popen(
            [repo.root / "run_train.sh", "train_configs/a.toml"],
            cwd=repo.root,
            env=env,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            preexec_fn=own_terminal,
        )
        os.close(inside)
        started.append((process, terminal))
        wait_for(repo, *(["launcher ready"] if extra.get("WORKERS") == "0" else ["worker 0 ready", "worker 1 ready"]))
        return process, terminal

    yield start
    pids = Path(f"{repo.log}.pids")
    for pid in pids.read_text().split() if pids.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    for process, terminal in started:
        process.kill()
        process.wait()
        os.close(terminal)


def report(repo: Repository) -> list[str]:
    return sorted(line for line in repo.calls if line.startswith(("worker", "launcher")) and "ready" not in line)


SAVED = ["worker 0 saved", "worker 0 saves", "worker 1 saved", "worker 1 saves"]


@pytest.mark.parametrize("how", ["ctrl-c", signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_lets_the_workers_save_and_spares_torchrun(repo, launch, how, tmp_path):
    process, terminal = launch()
    if how == "ctrl-c":
        os.write(terminal, b"\x03")
    else:
        process.send_signal(how)
    assert process.wait(20) == 0
    assert report(repo) == SAVED
    assert not list(tmp_path.glob("titanrepa.*"))


def test_a_failure_shows_the_last_words_of_every_process_and_keeps_the_rest(repo, launch, tmp_path):
    process, terminal = launch(status=3)
    (kept,) = tmp_path.glob("titanrepa.*")
    for rank, words in enumerate(["no such file\n", "no such file\n", "10%\r20%\rout of memory\n", ""]):
        log = kept / "job" / "attempt_0" / str(rank) / "stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(words and "line\n" * 20 + words)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    said = os.read(terminal, 10_000).decode().replace("\r", "")
    assert f"status 3; all that each process printed is in {kept}" in said
    lines = "line\n" * 4
    assert f"Last words of process 0:\n{lines}no such file\n" in said
    assert "process 2:\nline\nline\n10%\n20%\nout of memory\n" in said
    assert "process 1" not in said and "process 3" not in said


def test_a_second_signal_does_not_disturb_the_saving(repo, launch):
    process, _ = launch(saving=0.5)
    process.send_signal(signal.SIGTERM)
    wait_for(repo, "worker 0 saves", "worker 1 saves")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert report(repo) == SAVED


def test_workers_that_fail_while_stopping_are_not_started_again(repo, launch):
    process, _ = launch(status=3, restarts=5, MAX_RESTARTS="5")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 9
    assert report(repo) == ["launcher signalled", *SAVED]
    assert repo.calls.count("worker 0 ready") == 2


def test_the_stop_file_tells_a_stopped_run_from_a_complete_one(repo, launch, tmp_path):
    file = tmp_path / "stop"
    file.write_text("of an earlier run\n")
    process, _ = launch(STOP_FILE=str(file))
    process.send_signal(signal.SIGUSR1)
    wait_for(repo, "worker 0 saves")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert report(repo) == SAVED
    old, new = file.read_text().splitlines()
    assert old == "of an earlier run" and new.endswith(": SIGUSR1")


def test_the_stop_file_speaks_for_machines_that_got_no_signal(repo, launch, tmp_path):
    file = tmp_path / "stop"
    process, _ = launch(STOP_FILE=str(file))
    file.write_text("another machine: SIGTERM\n")
    for pid in Path(f"{repo.log}.pids").read_text().split():  # as after a message from another rank
        os.kill(int(pid), signal.SIGTERM)
    assert process.wait(20) == 75


def test_without_a_signal_the_stop_file_changes_nothing(repo, launch, tmp_path):
    file = tmp_path / "stop"
    file.write_text("of an earlier run\n")
    process, _ = launch(STOP_FILE=str(file))
    for pid in Path(f"{repo.log}.pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    assert process.wait(20) == 0
    assert file.read_text() == "of an earlier run\n"


@pytest.mark.parametrize("restarts", [0, 5])
def test_a_second_ctrl_c_ends_at_once(repo, launch, restarts):
    process, terminal = launch(saving=60, restarts=restarts, MAX_RESTARTS=str(restarts))
    os.write(terminal, b"\x03")
    wait_for(repo, "worker 0 saves", "worker 1 saves")
    os.write(terminal, b"\x03")
    # Of torchrun's stub, which must not start new ones, or of the workers, which do not answer and are killed.
    assert process.wait(20) == 9
    ended = ["launcher signalled"] if restarts else []
    assert report(repo) == [*ended, "worker 0 saves", "worker 1 saves"]
    assert repo.calls.count("worker 0 ready") == 1


def test_a_signal_before_the_workers_start_ends_torchrun(repo, launch):
    process, terminal = launch(WORKERS="0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert b"interrupted (SIGTERM); repeat the command to resume" in os.read(terminal, 10_000)
    assert report(repo) == ["launcher signalled"]


def test_a_signal_that_was_ignored_stays_so(repo, launch):
    """As nohup does with SIGHUP, and a shell that starts the script in the background with SIGINT."""
    process, _ = launch(ignored=(signal.SIGHUP, signal.SIGINT))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert report(repo) == [] and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert report(repo) == SAVED


def test_the_status_is_known_where_sigchld_was_ignored(repo, launch):
    process, _ = launch(status=3, ignored=(signal.SIGCHLD,))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    assert report(repo) == SAVED


# -- with torchrun itself -------------------------------------------------------------------------------------------

# Stand-in for the trainer: "trains" until told to stop; if told to, it dies in its first life.
TRAINER = """
import os, signal, time
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
stopping = []
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, _: stopping.append(number))
with open(os.environ["LOG"], "a") as log:
    log.write(f"rank {os.environ['RANK']} life {life} pid {os.getpid()}\\n")
while not stopping and not (life == "1" and os.environ.get("END_IN_SECOND_LIFE")):
    time.sleep(0.05)
time.sleep(1)  # saving takes longer than a signal by way of run_train.sh
with open(os.environ["LOG"], "a") as log:
    log.write(f"rank {os.environ['RANK']} saved\\n")
"""


@pytest.fixture
def torchrun(repo):
    """Start run_train.sh with two real processes; return it and their pids once they run. Kills the remaining ones."""
    started = []

    def start(**env: str) -> tuple[subprocess.Popen, list[int]]:
        started.append(start_torchrun(repo, **env))
        return started[-1]

    yield start
    left = [process.pid for process, _ in started if process.poll() is None]
    left += [int(line.split()[-1]) for line in repo.calls if " life " in line]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_torchrun(repo: Repository, **env: str) -> tuple[subprocess.Popen, list[int]]:
    (repo.root / "trainer" / "__main__.py").write_text(TRAINER)
    process = subprocess.Popen(
        [repo.root / "run_train.sh", "train_configs/a.toml"],
        cwd=repo.root,
        env=repo.environment(PYTHON=sys.executable, NGPU="2", TMPDIR=str(repo.log.parent), **env),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while len(pids := [int(line.split()[-1]) for line in repo.calls if "life 0" in line]) < 2:
        assert process.poll() is None and time.monotonic() < until, repo.calls
        time.sleep(0.05)
    return process, pids


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_every_process_of_the_job_is_survived(repo, torchrun, number):
    """Slurm signals all processes of a step, including torchrun."""
    process, workers = torchrun()
    for pid in (parent(workers[0]), process.pid, *workers):
        os.kill(pid, number)
    assert process.wait(60) == 0, process.stderr.read()
    assert {"rank 0 saved", "rank 1 saved"} <= set(repo.calls)


def test_a_killed_process_is_restarted_with_the_others(repo, torchrun):
    process, workers = torchrun(MAX_RESTARTS="1", END_IN_SECOND_LIFE="1")
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert sorted(line.split(" pid")[0] for line in repo.calls if "life 1" in line) == [
        "rank 0 life 1",
        "rank 1 life 1",
    ]
    assert "processes died and were restarted; all that each printed is in" in said
