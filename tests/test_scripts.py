"""run_train.sh, run_tests.sh and the set-up before them, with stubs in place of Python, pip and torchrun."""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# All that the scripts may call; nvidia-smi and real Pythons stay out of sight.
TOOLS = (
    *("basename", "bash", "cat", "chmod", "cksum", "cp", "dirname", "env", "flock", "getconf", "grep", "head"),
    *("mkdir", "mktemp", "nproc", "pgrep", "readlink", "rm", "sleep", "tail", "tr"),
)

# Every call goes into the log, named after the stub's file. What it answers lies in files beside the log.
FAKE_PYTHON = """#!/usr/bin/env bash
name=$(basename "$0")
[[ $0 != */.venv/* ]] || name=.venv
answer() { cat "$LOG.$name.$1" 2>/dev/null || echo "$2"; }
case $1 in
  -) cat >/dev/null; echo "$name check ${*:3}" >>"$LOG"; exit "$(answer check 0)" ;;
  --version) echo "Python $(answer version 3.12.1)" ;;
  -c)
    case $2 in
      *version_info*) answer version 3.12 ;;
      *ensurepip*) exit "$(answer ensurepip 0)" ;;
      *device_count*) answer devices 0 ;;
    esac
    ;;
  -m)
    echo "$name $*" >>"$LOG"
    case $2 in
      venv) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
      pip) sleep "$(answer slow 0)"; exit "$(answer pip 0)" ;;
      torch.distributed.run) env >"$LOG.env"; [[ -z ${LAUNCHER:-} ]] || exec "$LAUNCHER" ;;
      trainer) env >"$LOG.env" ;;
      ruff | pytest) exit "$(answer "$2${3:+-$3}" 0)" ;;
    esac
    ;;
esac
"""


class Repository:
    """A copy of the scripts in a folder of their own, and a PATH of stubs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "re po"
        self.bin = folder / "bin"
        self.log = folder / "log"
        for file in ("run_train.sh", "run_tests.sh", ".ci/run", "trainer/setup_env.sh", "pyproject.toml"):
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, self.root / file)
        (self.root / "train_configs").mkdir()
        (self.root / "train_configs" / "a.toml").touch()
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found:
                (self.bin / tool).symlink_to(found)
        self.python("python3")

    def python(self, name: str, **answers: object) -> None:
        """A stub of this name; ``check`` is the exit status of the check for packages (3 too old, 4 lacks some)."""
        if name != ".venv":
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        for key, value in answers.items():
            Path(f"{self.log}.{name}.{key.replace('_', '-')}").write_text(f"{value}\n")

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "LOG": str(self.log), "HOME": str(self.bin)} | extra

    def run(self, script: str | Path, *arguments: str, cwd: Path | None = None, **env: str):
        return subprocess.run(
            [self.root / script, *arguments],
            cwd=cwd or self.root,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def train(self, *arguments: str, **env: str):
        result = self.run("run_train.sh", "train_configs/a.toml", *arguments, **env)
        assert result.returncode == 0, result.stderr
        return result

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def seen(self) -> dict[str, str]:
        """Environment of the launched program."""
        lines = Path(f"{self.log}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


# -- arguments ------------------------------------------------------------------------------------------------------


def test_usage_is_shown_without_setting_anything_up(repo):
    for arguments, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = repo.run("run_train.sh", *arguments)
        assert result.returncode == status
        text = result.stdout + result.stderr
        words = "CONFIG --section.key=value NGPU NNODES NODE_RANK MASTER_ADDR MASTER_PORT LOG_RANK PYTHON Examples"
        for word in words.split():
            assert word in text
    assert repo.calls == []


def test_a_missing_config_lists_those_that_exist(repo):
    result = repo.run("run_train.sh", "train_configs/b.toml")
    assert result.returncode == 2
    assert "no config file 'train_configs/b.toml'" in result.stderr
    assert f"{repo.root}/train_configs/a.toml" in result.stderr
    assert repo.calls == []
    result = repo.run("run_train.sh", "--run.steps=3", "train_configs/a.toml")
    assert result.returncode == 2
    assert "first argument is the config file, not '--run.steps=3'" in result.stderr


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NGPU": "0"}, "NGPU must be a whole number from 1 on, not '0'"),
        ({"NGPU": "two"}, "NGPU must be a whole number"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "of NNODES=2 machines the last is 1"),
    ],
)
def test_wrong_variables_are_named(repo, env, words):
    result = repo.run("run_train.sh", "train_configs/a.toml", **env)
    assert result.returncode == 2
    assert words in result.stderr
    assert repo.calls == []


def test_one_process_runs_the_trainer_itself_with_the_overrides_untouched(repo):
    repo.train("--run.name=a b", "--x.list=[1, 2]", "--empty=")
    assert repo.calls[-1] == "python3 -m trainer train train_configs/a.toml --run.name=a b --x.list=[1, 2] --empty="
    assert repo.seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "OMP_NUM_THREADS" not in repo.seen


def test_the_repository_comes_before_the_callers_folder_and_pythonpath(repo, tmp_path):
    repo.train(PYTHONPATH="/elsewhere")
    assert repo.seen["PYTHONPATH"] == f"{repo.root}:/elsewhere:{repo.root}"
    link = tmp_path / "link"
    link.symlink_to(repo.root / "run_train.sh")
    (tmp_path / "mine.toml").touch()
    result = subprocess.run(["../link", "../mine.toml"], cwd=repo.bin, env=repo.environment(), timeout=60)
    assert result.returncode == 0
    assert repo.calls[-1] == "python3 -m trainer train ../mine.toml"
    assert repo.seen["PYTHONPATH"] == f"{repo.root}:{repo.bin}"
    assert repo.seen["PWD"] == str(repo.bin)
    assert repo.seen["PYTHONSAFEPATH"] == "1"


def test_settings_of_the_allocator_and_threads_are_respected(repo):
    repo.train(PYTORCH_CUDA_ALLOC_CONF="backend:native")
    assert "PYTORCH_ALLOC_CONF" not in repo.seen
    repo.train(NGPU="2", OMP_NUM_THREADS="7")
    assert repo.seen["OMP_NUM_THREADS"] == "7"


def test_several_processes_are_started_by_torchrun(repo):
    (repo.bin / "nproc").unlink()
    (repo.bin / "nproc").write_text("#!/usr/bin/env bash\necho 9\n")
    (repo.bin / "nproc").chmod(0o755)
    repo.train("--a.b=c d", NGPU="2", LOG_RANK="0,1")
    call = repo.calls[-1]
    assert call.startswith("python3 -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d")
    assert "--rdzv-endpoint localhost:0" in call
    assert "--local-ranks-filter 0,1 --role rank --tee 3" in call
    assert call.endswith("-m trainer train train_configs/a.toml --a.b=c d")
    assert repo.seen["OMP_NUM_THREADS"] == "4"
    repo.train(NGPU="20")
    assert repo.seen["OMP_NUM_THREADS"] == "1"
    assert "--local-ranks-filter 0 " in repo.calls[-1]


def test_several_machines_meet_at_the_first(repo):
    repo.train(NNODES="2", NODE_RANK="1", MASTER_ADDR="node0")
    assert "--nproc-per-node 1 --nnodes 2 --node-rank 1 --rdzv-endpoint node0:29500" in repo.calls[-1]
    repo.train(NNODES="2", NODE_RANK="0", MASTER_ADDR="node0", MASTER_PORT="1234", NGPU="8")
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node0:1234" in repo.calls[-1]


def test_gpus_are_counted(repo):
    smi = repo.bin / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\nfor i in 0 1 2; do echo \"GPU $i: X\"; echo '  MIG 1g'; done\n")
    smi.chmod(0o755)
    repo.train()
    assert "--nproc-per-node 3 " in repo.calls[-1]
    repo.python("python3", devices=2)
    repo.train(CUDA_VISIBLE_DEVICES="0,2,-1")
    assert "--nproc-per-node 2 " in repo.calls[-1]
    repo.python("python3", devices=0)
    repo.train(CUDA_VISIBLE_DEVICES="")
    assert repo.calls[-1].startswith("python3 -m trainer")
    repo.train(NGPU="1")
    assert repo.calls[-1].startswith("python3 -m trainer")
    repo.python("python3", devices=5)  # not asked: importing torch would cost seconds
    smi.write_text("#!/usr/bin/env bash\necho 'has failed because it could not communicate with the driver'; exit 9\n")
    repo.train(CUDA_VISIBLE_DEVICES="0,1")
    assert repo.calls[-1].startswith("python3 -m trainer")


# -- signals --------------------------------------------------------------------------------------------------------

# As torchrun does: workers in sessions of their own, and death by any signal. Python, since a shell that is started
# in the background cannot trap SIGINT.
LAUNCHER = f"""#!{sys.executable}
import os, signal, subprocess, sys

def die(*_):
    with open(os.environ["LOG"], "a") as log:
        log.write("launcher signalled\\n")
    os._exit(9)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, die)
worker = ["bash", __file__ + ".worker"]
workers = [subprocess.Popen([*worker, str(i)], start_new_session=True) for i in range(2)]
status = max(abs(w.wait()) for w in workers)
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
    """Starts run_train.sh on a terminal of its own, with torchrun's stub and two workers; kills what is left."""
    (tmp_path / "launcher").write_text(LAUNCHER)
    (tmp_path / "launcher").chmod(0o755)
    (tmp_path / "launcher.worker").write_text(WORKER)
    started = []

    def start(saving: float = 0.1, status: int = 0) -> tuple[subprocess.Popen, int]:
        terminal, inside = pty.openpty()

        def own_terminal():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # what pytest was started with ignored, bash cannot trap
            os.setsid()
            fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

        env = repo.environment(
            NGPU="2", LAUNCHER=str(tmp_path / "launcher"), SAVING=str(saving), STATUS=str(status), TMPDIR=str(tmp_path)
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
        wait_for(repo, "worker 0 ready", "worker 1 ready")
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


def wait_for(repo: Repository, *lines: str) -> None:
    until = time.monotonic() + 20
    while not set(lines) <= set(repo.calls):
        assert time.monotonic() < until, repo.calls
        time.sleep(0.01)


def report(repo: Repository) -> list[str]:
    return sorted(line for line in repo.calls if line.startswith(("worker", "launcher")) and "ready" not in line)


SAVED = ["worker 0 saved", "worker 0 saves", "worker 1 saved", "worker 1 saves"]


@pytest.mark.parametrize("how", ["ctrl-c", signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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


def test_a_second_ctrl_c_ends_at_once(repo, launch):
    process, terminal = launch(saving=60)
    os.write(terminal, b"\x03")
    wait_for(repo, "worker 0 saves", "worker 1 saves")
    os.write(terminal, b"\x03")
    assert process.wait(20) == signal.SIGKILL
    assert report(repo) == ["worker 0 saves", "worker 1 saves"]


def test_workers_are_found_without_pgrep(repo, launch):
    (repo.bin / "pgrep").unlink(missing_ok=True)
    process, _ = launch()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert report(repo) == SAVED


# -- set-up ---------------------------------------------------------------------------------------------------------

INSTALL = ".venv -m pip install --quiet --disable-pip-version-check -e .[test]"


def made(repo: Repository, base: str = "python3") -> str:
    return f"{base} -m venv {repo.root}/.venv"


def without_checks(repo: Repository) -> list[str]:
    calls = [call for call in repo.calls if " check" not in call]
    repo.log.unlink()
    return calls


RUN = "-m trainer train train_configs/a.toml"


def test_a_complete_python_is_used_as_it_is(repo):
    repo.train()
    assert repo.calls == ["python3 check ", f"python3 {RUN}"]
    assert not (repo.root / ".venv").exists()
    repo.python("mine")
    repo.train(PYTHON="mine")
    assert repo.calls[-1] == f"mine {RUN}"


def test_otherwise_the_environment_is_made_once(repo):
    repo.python("python3", check=4)
    first = repo.train()
    assert without_checks(repo) == [made(repo), INSTALL, f".venv {RUN}"]
    assert "this takes minutes" in first.stderr
    second = repo.train()
    assert without_checks(repo) == [f".venv {RUN}"]
    assert second.stderr == ""
    assert repo.run("run_tests.sh").returncode == 0
    assert not any("pip" in call for call in repo.calls)


def test_a_failed_installation_is_begun_anew(repo):
    repo.python("python3", check=4)
    repo.python(".venv", pip=1)
    failed = repo.run("run_train.sh", "train_configs/a.toml")
    assert failed.returncode == 1
    assert "installing failed" in failed.stderr and "Without a network" in failed.stderr
    assert without_checks(repo) == [made(repo), INSTALL]
    (repo.root / ".venv" / "rest").touch()
    repo.python(".venv", pip=0)
    again = repo.train()
    assert "removing the unfinished" in again.stderr
    assert without_checks(repo) == [made(repo), INSTALL, f".venv {RUN}"]
    assert not (repo.root / ".venv" / "rest").exists()


def test_a_kill_during_the_installation_is_repaired_too(repo):
    repo.python("python3", check=4)
    repo.python(".venv", slow=30)
    process = subprocess.Popen(
        [repo.root / "run_train.sh", "train_configs/a.toml"],
        cwd=repo.root,
        env=repo.environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(repo, INSTALL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    repo.python(".venv", slow=0)
    repo.log.unlink()
    repo.train()
    assert without_checks(repo) == [made(repo), INSTALL, f".venv {RUN}"]


def test_changed_requirements_are_installed_into_the_same_environment(repo):
    repo.python("python3", check=4)
    repo.train()
    repo.log.unlink()
    with open(repo.root / "pyproject.toml", "a") as file:
        file.write("\n")
    repo.train()
    assert without_checks(repo) == [INSTALL, f".venv {RUN}"]


def test_an_environment_of_the_users_own_is_used_if_it_is_complete(repo):
    repo.python("python3", check=4)
    (repo.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(repo.bin / "python3", repo.root / ".venv" / "bin" / "python")
    repo.train()
    assert without_checks(repo) == [f".venv {RUN}"]
    repo.python(".venv", check=4)
    repo.train()
    assert without_checks(repo) == [INSTALL, f".venv {RUN}"]


def test_an_environment_whose_python_is_gone_is_made_anew(repo):
    repo.python("python3", check=4)
    repo.train()
    (repo.root / ".venv" / "bin" / "python").unlink()
    (repo.root / ".venv" / "bin" / "python").symlink_to("/nowhere")
    repo.log.unlink()
    repo.train()
    assert without_checks(repo) == [made(repo), INSTALL, f".venv {RUN}"]


def test_two_starts_at_once_install_once(repo):
    if not shutil.which("flock"):
        pytest.skip("no flock on this machine: starts do not wait for each other")
    repo.python("python3", check=4)
    repo.python(".venv", slow=1)
    command = [repo.root / "run_train.sh", "train_configs/a.toml"]
    processes = [
        subprocess.Popen(command, cwd=repo.root, env=repo.environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = "".join(process.communicate(timeout=30)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "another start is installing; waiting" in errors
    assert without_checks(repo) == [made(repo), INSTALL, f".venv {RUN}", f".venv {RUN}"]


def test_an_old_python_gives_way_to_a_newer_one_on_the_path(repo):
    repo.python("python3", check=3, version="3.8.10")
    result = repo.run("run_train.sh", "train_configs/a.toml")
    assert result.returncode == 1
    assert "python3 is not a Python 3.10 or newer (Python 3.8.10)" in result.stderr
    repo.python("python3.13", check=127)  # a shim that leads nowhere
    repo.python("python3.11", check=4)
    repo.train()
    assert without_checks(repo) == [made(repo, "python3.11"), INSTALL, f".venv {RUN}"]
    shutil.rmtree(repo.root / ".venv")
    result = repo.run("run_train.sh", "train_configs/a.toml", PYTHON="python3")
    assert result.returncode == 1
    assert "name one: PYTHON=" in result.stderr


def test_a_missing_venv_module_names_the_package(repo):
    repo.python("python3", check=4, ensurepip=1, version="3.12")
    result = repo.run("run_train.sh", "train_configs/a.toml")
    assert result.returncode == 1
    assert "apt install python3.12-venv" in result.stderr
    assert not (repo.root / ".venv").exists()


def check(repo: Repository, *arguments: str) -> tuple[int, str]:
    script = 'source "$1/trainer/setup_env.sh"; setup_check "${@:2}"'
    command = ["bash", "-c", script, "bash", str(repo.root), sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout.strip()


def test_the_check_knows_what_a_real_python_lacks(repo):
    project = repo.root / "pyproject.toml"
    assert check(repo) == (0, "")
    project.write_text(
        '[project]\ndependencies = ["pytest>=8", "pillow>=10", "nothing>=1; python_version < \'3.0\'"]\n'
    )
    assert check(repo) == (0, "")
    project.write_text(
        '[project]\ndependencies = ["pytest>=999.1", "not-there"]\n'
        'optional-dependencies.test = ["numpy", "nor-this>=1"]\n'
    )
    status, lacking = check(repo)
    assert status == 4
    assert lacking == f"pytest>=999.1 (it has {pytest.__version__}), not-there"
    assert check(repo, "test")[1].endswith("not-there, nor-this")


def test_the_check_is_quick_because_it_imports_nothing(repo):
    start = time.monotonic()
    probe = repo.bin / "probe"
    probe.write_text(f'#!/bin/sh\nexec "{sys.executable}" -X importtime "$@" 2>"{repo.log}.imports"\n')
    probe.chmod(0o755)
    script = 'source "$1/trainer/setup_env.sh"; setup_check "$2" test'
    subprocess.run(["bash", "-c", script, "bash", str(repo.root), str(probe)], check=True, timeout=60)
    imported = {line.split("|")[-1].strip() for line in Path(f"{repo.log}.imports").read_text().splitlines()}
    assert "importlib.metadata" in imported
    assert not imported & {"torch", "numpy", "timm", "PIL", "pydantic"}
    assert time.monotonic() - start < 5


# -- tests ----------------------------------------------------------------------------------------------------------


def test_run_tests_checks_the_style_and_runs_everything(repo):
    result = repo.run("run_tests.sh", "-k", "a b", cwd=repo.bin)
    assert result.returncode == 0, result.stderr
    assert repo.calls == [
        "python3 check test",
        "python3 -m ruff check .",
        "python3 -m ruff format --check .",
        "python3 -m pytest -k a b",
    ]
    assert repo.run(".ci/run", cwd=repo.bin).returncode == 0
    assert repo.calls[-1] == "python3 -m pytest"


@pytest.mark.parametrize("failing", ["ruff_check", "ruff_format", "pytest"])
def test_run_tests_fails_if_one_of_them_does_and_runs_them_all(repo, failing):
    repo.python("python3", **{failing: 5})
    assert repo.run(".ci/run").returncode == 5
    assert repo.calls[-1] == "python3 -m pytest"
