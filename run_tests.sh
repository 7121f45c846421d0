#!/usr/bin/env bash
# Usage: run_tests.sh [pytest arguments]
# Installs what is missing into .venv, checks style (ruff) and types (mypy), then runs the tests: all but the slow ones,
# unless told otherwise (-m slow), or without the long ones, too (--fast). TITANREPA_TORCH=2.11 tests with that release
# of PyTorch, in an environment of its own.
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"
setup_python test

cd "$root"
# Many small computations in several processes at once: more threads than one each would be in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
style=0
"$PYTHON" -m ruff check . || style=$?
"$PYTHON" -m ruff format --check . || style=$?
"$PYTHON" -m mypy || style=$?
# A file's tests stay together, since they share what is made once; tests/conftest.py orders the files.
"$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
exit "$style"
