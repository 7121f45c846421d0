#!/usr/bin/env bash
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

usage() {
  cat <<EOF
Usage: run_train.sh CONFIG [--section.key=value ...]

Trains as the TOML file CONFIG says; each --section.key=value replaces one of its values. Installs what is missing
into .venv first, then starts one process per GPU, or one process on a machine without GPU. Started again with the
same CONFIG, a run goes on from its newest checkpoint. Ctrl-C or SIGTERM finishes the step, saves and ends; Ctrl-C a
second time ends at once.

Environment:
  PYTHON       the Python to use, if it has every package, or to make .venv with (default: python3)
  NGPU         processes on this machine (default: its GPUs, or 1); also works without GPUs, over gloo
  LOG_RANK     local ranks whose output is shown, such as 0,3 (default: 0)
  NNODES       machines that train together (default: 1); start this script on each of them
  NODE_RANK    which of them this is, from 0
  MASTER_ADDR  name or address of machine 0
  MASTER_PORT  a free port of machine 0 (default: 29500)

Examples:
  ./run_train.sh train_configs/quickstart.toml
  ./run_train.sh train_configs/quickstart.toml --training.steps=100 --training.seed=1
  NGPU=4 ./run_train.sh train_configs/repae_sit_xl.toml
  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ./run_train.sh train_configs/repae_sit_xl.toml   # NODE_RANK=1 on the other
EOF
}

fail() {
  printf 'run_train.sh: %s\n' "$*" >&2
  exit 2
}

whole_number() { # NAME MINIMUM: the variable must hold one
  if ! [[ ${!1} =~ ^[0-9]{1,6}$ ]] || ((10#${!1} < $2)); then
    fail "$1 must be a whole number from $2 on, not '${!1}'"
  fi
}

count_gpus() {
  local count
  count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  # torch knows best what the variables hide, but takes seconds to ask.
  if [[ -n ${CUDA_VISIBLE_DEVICES+set}${HIP_VISIBLE_DEVICES+set}${ROCR_VISIBLE_DEVICES+set} && $count != 0 ||
    $count == 0 && -e /dev/kfd ]]; then
    count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  fi
  echo "$count"
}

# shellcheck disable=SC2317 # called by stop
children() { # PID
  if command -v pgrep >/dev/null; then
    pgrep -P "$1" || true
  else
    local file line
    for file in /proc/[0-9]*/stat; do
      read -r line 2>/dev/null <"$file" || continue
      line=${line##*) } # behind the command's name: state, parent, ...
      [[ ${line#* } != "$1 "* ]] || basename "${file%/stat}"
    done
  fi
}

launcher=
stopping=
interrupted=0
# shellcheck disable=SC2317 # called by trap
stop() { # SIGNAL
  interrupted=1
  [[ -n $launcher ]] || exit 143
  local workers
  mapfile -t workers < <(children "$launcher")
  if ((${#workers[@]} == 0)); then
    kill -TERM "$launcher" 2>/dev/null || true
  elif [[ -z $stopping ]]; then
    kill -TERM "${workers[@]}" 2>/dev/null || true
  elif [[ $1 == INT ]]; then
    kill -KILL "${workers[@]}" 2>/dev/null || true
  fi
  stopping=1
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  '')
    usage >&2
    exit 2
    ;;
  -*) fail "the first argument is the config file, not '$1' (--help explains)" ;;
esac
if [[ ! -f $1 ]]; then
  {
    printf "run_train.sh: there is no config file '%s' (looked from %s). Shipped ones:\n" "$1" "$PWD"
    printf '  %s\n' "$root"/train_configs/*.toml
  } >&2
  exit 2
fi
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}
whole_number NNODES 1
whole_number NODE_RANK 0
whole_number MASTER_PORT 1
((NODE_RANK < NNODES)) || fail "NODE_RANK is $NODE_RANK, but of NNODES=$NNODES machines the last is $((NNODES - 1))"
((NNODES == 1)) || [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the name or address of machine 0"
[[ -z ${NGPU:-} ]] || whole_number NGPU 1

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"
# shellcheck disable=SC2119
setup_python

NGPU=${NGPU:-$(count_gpus)}
((NGPU > 0)) || NGPU=1
# Fewer failures for want of memory at the same peak use.
[[ -n ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=expandable_segments:True

if ((NGPU == 1 && NNODES == 1)); then
  exec "$PYTHON" -m trainer train "$@"
fi

if ((NNODES == 1)); then
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint localhost:0 --local-addr localhost)
else
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
fi
logs=$(mktemp -d "${TMPDIR:-/tmp}/titanrepa.XXXXXX")

trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop HUP' HUP
# torchrun would answer a signal by killing its workers. Job control puts it into a process group of its own, out of
# reach of Ctrl-C; stop() tells the workers alone, they finish the step, save and end, and torchrun ends with them.
set -m
"$PYTHON" -m torch.distributed.run --nproc-per-node "$NGPU" "${rendezvous[@]}" --log-dir "$logs" \
  --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 -m trainer train "$@" </dev/null &
launcher=$!
set +m
while
  interrupted=0
  status=0
  wait "$launcher" || status=$?
  ((interrupted && status > 128)) # a signal ended the wait, not torchrun
do :; done
if ((status == 0)); then
  rm -rf "$logs"
else
  {
    # The process that failed first is often not one whose output was shown, and torchrun's own report is long.
    words=
    for file in "$logs"/*/attempt_*/*/stderr.log; do
      [[ -s $file ]] || continue
      before=$words
      words=$(tail -c 2000 "$file" | tr '\r' '\n' | tail -n 5)
      [[ $words == "$before" ]] || printf '\nLast words of process %s:\n%s\n' "$(basename "${file%/*}")" "$words"
    done
    printf 'run_train.sh: ended with status %s; all that each process printed is in %s\n' "$status" "$logs"
  } >&2
fi
exit "$status"
