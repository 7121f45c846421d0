"""Setup before run_train.sh and run_tests.sh: which Python is used, and what is installed when."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.script_stubs import Repository, wait_for


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


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
    repo.python("python3.13", check=127)  # a broken shim
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
