#!/usr/bin/env bash
# Usage: benchmarks/gpu.sh OUT [SECONDS] [options of benchmarks/gpu.py]
#
# Everything that one GPU can tell about this project, in at most SECONDS (default: 470): versions, the tests that need
# a GPU, and benchmarks/gpu.py. Results so far are in OUT, whenever it is stopped: gpu.json, tests.txt, log.txt.
#
# Environment:
#   PYTHON=...          Python with the project's packages (default: .venv/bin/python where there is one, else python3)
#   SKIP_TESTS=1        no tests: all the time is the benchmark's
#   TEST_PROCESSES=8    processes of the tests, if pytest-xdist is installed
#
# Wheels in .whl/, if there are any, are installed into a temporary folder, for machines without a package index.
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
# Without segments that grow, batches near the limit fail for fragmentation.
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
  # Meanwhile, what the benchmark needs is compiled into Inductor's cache: both mostly wait for the host.
  warm=''
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    timeout --signal=INT --kill-after=5 "$((limit * 9 / 20))" \
      "$python" benchmarks/gpu.py --out "$out" --warm "$@" >"$out/warm.txt" 2>&1 &
    warm=$!
  fi
  # Only files with such tests: each process would import all the others.
  mapfile -t files < <(grep -rlE 'mark\.cuda' --include='test_*.py' tests)
  processes=()
  "$python" -c 'import xdist' 2>/dev/null && processes=(-n "${TEST_PROCESSES:-8}" --dist load)
  # -v: a line for each test as it ends, also when time runs out.
  TORCHINDUCTOR_COMPILE_THREADS=2 timeout --signal=INT --kill-after=10 "$tests" \
    "$python" -m pytest -m cuda "${files[@]}" -o addopts= -v "${processes[@]}" --durations=8 -rfE --tb=short \
    >"$out/tests.txt" 2>&1
  echo "pytest ended with $? (0: all passed or skipped; 5: there are none; 124, 137: out of time)"
  grep -E '^E  |PASSED|FAILED|ERROR|passed|failed|skipped|deselected|s (call|setup)' "$out/tests.txt" |
    cut -c1-240 | tail -n 60
  if [[ -n $warm ]]; then
    wait "$warm"
    echo "compiling ahead ended with $? (124, 137: out of time) after $((SECONDS - began)) s"
    tail -n 2 "$out/warm.txt" | cut -c1-240
  fi
fi

echo "== benchmarks/gpu.py ($(left) s left) -> $out/gpu.json"
# It ends by itself before the time limit; the signal is for a step that hangs.
timeout --signal=INT --kill-after=10 "$(most "$(left)" 10)" \
  "$python" benchmarks/gpu.py --out "$out" --seconds "$(most $(($(left) - 10)) 0)" "$@"
status=$?
echo "gpu.py ended with $status; $((SECONDS - began)) s in all"
exit "$status"
