#!/usr/bin/env bash
# Usage: benchmarks/gpu.sh OUT [SECONDS] [options of benchmarks/gpu.py]
#
# Tests and benchmarks this project on one GPU in at most SECONDS (default: 470): prints versions, runs the tests that
# need a GPU, then benchmarks/gpu.py. If stopped, results so far are in OUT: gpu.json, tests.txt, log.txt.
#
# Environment:
#   PYTHON=...          Python with the project's packages (default: .venv/bin/python if it exists, otherwise python3)
#   SKIP_TESTS=1        skip the tests and use all the time for the benchmark
#   PYTEST_ADDOPTS=...  of pytest, for example "-k offloaded"
#   TEST_PROCESSES=8    number of test processes, if pytest-xdist is installed
#
# Wheels in .whl/, if any, are installed into a temporary folder, for machines without a package index.
set -uo pipefail

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | grep -v '^set '; }
case ${1:-} in
  '' | -h | --help)
    usage
    [[ -n ${1:-} ]]
    exit
    ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
limit=470
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  limit=$1
  shift
fi
cd "$root" || exit 2
began=$SECONDS
left() { echo $((limit - SECONDS + began)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
most() { echo $(($1 > $2 ? $1 : $2)); }
exec > >(tee -a "$out/log.txt") 2>&1

python=${PYTHON:-}
[[ -z $python && -x .venv/bin/python ]] && python=.venv/bin/python
python=${python:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$site" .whl/*.whl || exit 3
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
# Without expandable segments, batches near the memory limit fail because of fragmentation.
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

echo "== $(date -u '+%F %T') UTC, at most $limit s"
git log -1 --format='commit %h %s' 2>/dev/null
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit \
  --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
"$python" - <<'PY' || exit 3
import importlib.metadata as metadata, platform, torch

names = "torch torchvision triton timm pydantic torchdata torch-fidelity torchmetrics numpy safetensors pytest"
found = {name: "missing" for name in names.split()}
for name in found:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print("python", platform.python_version(), *(f"{n} {v}" for n, v in found.items()))
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "GPU", gpu)
PY

if [[ -z ${SKIP_TESTS:-} ]]; then
  tests=$(least 150 $((limit / 3)))
  echo "== pytest -m cuda (at most $tests s) -> $out/tests.txt"
  # Meanwhile, compile the benchmark's networks into Inductor's cache; both tasks are mostly bound by the host.
  warm=''
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    timeout --signal=INT --kill-after=5 "$((limit * 9 / 20))" \
      "$python" benchmarks/gpu.py --out "$out" --warm "$@" >"$out/warm.txt" 2>&1 &
    warm=$!
  fi
  # Pass only files with CUDA tests, since each process imports all files it is given.
  mapfile -t files < <(grep -rlE 'mark\.cuda' --include='test_*.py' tests)
  processes=()
  "$python" -c 'import xdist' 2>/dev/null && processes=(-n "${TEST_PROCESSES:-8}" --dist load)
  # -v prints a line as each test ends, which remains if time runs out.
  TORCHINDUCTOR_COMPILE_THREADS=2 timeout --signal=INT --kill-after=10 "$tests" \
    "$python" -m pytest -m cuda "${files[@]}" -o addopts= -v "${processes[@]}" --durations=8 -rfE --tb=short \
    >"$out/tests.txt" 2>&1
  echo "pytest ended with $? (0: all passed or skipped; 5: no tests; 124, 137: out of time)"
  grep -E '^E  |PASSED|FAILED|ERROR|passed|failed|skipped|deselected|s (call|setup)' "$out/tests.txt" |
    cut -c1-240 | tail -n 60
  if [[ -n $warm ]]; then
    wait "$warm"
    echo "compiling ahead ended with $? (124, 137: out of time) after $((SECONDS - began)) s"
    tail -n 2 "$out/warm.txt" | cut -c1-240
  fi
fi

echo "== benchmarks/gpu.py ($(left) s left) -> $out/gpu.json"
# It exits by itself before the time limit; the signal is for a step that hangs.
timeout --signal=INT --kill-after=10 "$(most "$(left)" 10)" \
  "$python" benchmarks/gpu.py --out "$out" --seconds "$(most $(($(left) - 10)) 0)" "$@"
status=$?
echo "gpu.py ended with $status; $((SECONDS - began)) s in all"
exit "$status"
