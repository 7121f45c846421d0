"""A copy of the shell scripts with stubs in place of Python, pip and torchrun."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT

# All commands the scripts may call; nvidia-smi and real Pythons are hidden.
TOOLS = (
    *("basename", "bash", "cat", "chmod", "cksum", "cp", "dirname", "env", "flock", "head"),
    *("mkdir", "readlink", "rm", "sed", "sleep"),
)
FILES = (
    *("run_train.sh", "run_tests.sh", ".ci/run", "pyproject.toml", "trainer/setup_env.sh", "trainer/__init__.py"),
    *(f"trainer/launch/{file}.py" for file in ("__init__", "__main__", "settings", "torchrun")),
)

# Each call is logged under the name of the stub's file. Its answers are read from files next to the log.
FAKE_PYTHON = """#!/usr/bin/env bash
name=$(basename "$0")
[[ $0 != */.venv*/bin/* ]] || { name=${0%/bin/*}; name=${name##*/}; }
answer() { cat "$LOG.$name.$1" 2>/dev/null || echo "$2"; }
case $1 in
  -) cat >/dev/null; echo "$name check ${*:3}" >>"$LOG"; exit "$(answer check 0)" ;;
  -S) exec "$REAL_PYTHON" "$@" ;; # the launcher, which finds this stub in PYTHON
  --version) echo "Python $(answer version 3.12.1)" ;;
  -c)
    case $2 in
      *version_info*) answer version 3.12 ;;
      *ensurepip*) exit "$(answer ensurepip 0)" ;;
      *device_count*) answer devices 0 ;;
      *torch.distributed.run*)
        echo "$name torchrun ${*:3}" >>"$LOG"
        env >"$LOG.env"
        [[ -z ${LAUNCHER:-} ]] || exec "$LAUNCHER"
        ;;
    esac
    ;;
  -m)
    echo "$name $*" >>"$LOG"
    case $2 in
      venv) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
      pip) sleep "$(answer slow 0)"; exit "$(answer pip 0)" ;;
      trainer) env >"$LOG.env"; echo "PID=$$" >>"$LOG.env" ;;
      ruff) exit "$(answer "$2-$3" 0)" ;;
      mypy | pytest) exit "$(answer "$2" 0)" ;;
    esac
    ;;
esac
"""


class Repository:
    """A copy of the scripts in a separate folder, and a PATH of stubs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "re po"
        self.bin = folder / "bin"
        self.log = folder / "log"
        for file in FILES:
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
        """Create a Python stub; ``check`` is the exit status of its package check (3: too old, 4: packages missing)."""
        if name != ".venv":
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        for key, value in answers.items():
            Path(f"{self.log}.{name}.{key.replace('_', '-')}").write_text(f"{value}\n")

    def environment(self, **extra: str) -> dict[str, str]:
        ours = {"PATH": str(self.bin), "LOG": str(self.log), "HOME": str(self.bin), "REAL_PYTHON": sys.executable}
        return ours | extra

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


def wait_for(repo: Repository, *lines: str) -> None:
    until = time.monotonic() + 20
    while not set(lines) <= set(repo.calls):
        assert time.monotonic() < until, repo.calls
        time.sleep(0.01)
