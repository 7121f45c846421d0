#!/usr/bin/env bash
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

usage() {
  cat <<EOF
Usage: run_train.sh CONFIG [--profile[=STEPS]] [--section.key=value ...]

Trains as the TOML file CONFIG says; each --section.key=value replaces one of its values; --profile records some steps
with PyTorch's profiler. Installs what is missing into .venv first, then starts one process per GPU, or one process on
a machine without GPU. Started again with the same CONFIG, a run goes on from its newest checkpoint. Ctrl-C, SIGTERM,
SIGHUP or SIGUSR1 on any machine finishes the step, saves and ends everywhere; Ctrl-C a second time ends at once.

Environment:
  PYTHON       the Python to use, if it has every package, or to make .venv with (default: python3)
  NGPU         processes on this machine (default: its GPUs, or 1); also works without GPUs, over gloo
  LOG_RANK     local ranks whose output is shown, such as 0,3 (default: 0)

Several machines, each of which starts this script with the same values (docs/cluster has Slurm and Kubernetes):
  NNODES       how many train together (default: 1), or MIN:MAX to let some come and go
  MASTER_ADDR  name or address of machine 0, where all meet
  MASTER_PORT  a free port of machine 0 (default: 29500)
  NODE_RANK    optional: 0 on machine 0, another number elsewhere; needed only where a machine cannot tell from
               MASTER_ADDR whether it is machine 0. It does not order the ranks
  LOCAL_ADDR   name or address under which the others reach this machine (default: its full host name)
  RDZV_ID      the same word on all machines, another one for each run that shares a port (default: SLURM_JOB_ID)

Restarts:
  MAX_RESTARTS how often all processes are started again after one of them died, each time from the newest checkpoint
               (default: 0). A machine that was lost joins again when this script is started there again
  STOP_FILE    a file on a disk that all machines share. A signal adds a line to it, and a run that ends because of it
               ends with status 75 on every machine, not 0: so schedulers tell a stopped run from a complete one

Unset ones are taken from the PET_ variables of torchrun that a Kubeflow PyTorchJob sets.

Examples:
  ./run_train.sh train_configs/quickstart.toml
  ./run_train.sh train_configs/quickstart.toml --training.steps=100 --training.seed=1
  NGPU=4 ./run_train.sh train_configs/repae_sit_xl.toml
  NNODES=2 MASTER_ADDR=node0 MAX_RESTARTS=3 ./run_train.sh train_configs/repae_sit_xl.toml   # on both machines
EOF
}

fail() {
  printf 'run_train.sh: %s\n' "$*" >&2
  exit 2
}

whole_number() { # NAME MINIMUM [SHOWN]: the variable must hold one
  if ! [[ ${!1} =~ ^[0-9]{1,6}$ ]] || ((10#${!1} < $2)); then
    fail "${3:-$1} must be a whole number from $2 on, not '${!1}'"
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
  [[ -z $STOP_FILE || -n $stopping ]] || printf '%(%F %T)T %s: SIG%s\n' -1 "$HOSTNAME" "$1" >>"$STOP_FILE" || true
  [[ -n $launcher ]] || exit 143
  local workers
  mapfile -t workers < <(children "$launcher")
  if ((${#workers[@]} == 0)); then
    kill -USR2 "$launcher" 2>/dev/null || true
  elif [[ -z $stopping ]]; then
    kill -TERM "${workers[@]}" 2>/dev/null || true
    if ((MAX_RESTARTS > 0)); then no_restart "${workers[@]}" & fi
  elif [[ $1 == INT ]]; then
    ((MAX_RESTARTS == 0)) || kill -USR2 "$launcher" 2>/dev/null || true
    kill -KILL "${workers[@]}" 2>/dev/null || true
  fi
  stopping=1
}

# shellcheck disable=SC2317 # called by stop
no_restart() { # PID...: ends torchrun if it starts workers anew, after one that failed before it could save
  local worker
  while kill -0 "$launcher" 2>/dev/null; do
    for worker in $(children "$launcher"); do
      [[ " $* " == *" $worker "* ]] || kill -USR2 "$launcher" 2>/dev/null || return 0
    done
    sleep 0.5
  done
}

stops() { # how many signals STOP_FILE has recorded
  [[ ! -s $STOP_FILE ]] || grep -c '' "$STOP_FILE"
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
NNODES=${NNODES:-${PET_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-}}
NGPU=${NGPU:-${PET_NPROC_PER_NODE:-}}
[[ $NGPU != auto && $NGPU != gpu ]] || NGPU=
endpoint=${PET_RDZV_ENDPOINT:-:29500}
MASTER_ADDR=${MASTER_ADDR:-${endpoint%:*}}
MASTER_PORT=${MASTER_PORT:-${endpoint##*:}}
MAX_RESTARTS=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-0}}
RDZV_ID=${RDZV_ID:-${PET_RDZV_ID:-${SLURM_JOB_ID:-titanrepa}}}
STOP_FILE=${STOP_FILE:-}
# A scheduler's, about machines or all processes; torchrun tells each of its processes their own.
unset PET_NODE_RANK WORLD_SIZE RANK LOCAL_RANK
[[ $NNODES == *:* ]] || NNODES=$NNODES:$NNODES
fewest=${NNODES%%:*} most=${NNODES#*:}
whole_number fewest 1 NNODES
whole_number most "$fewest" NNODES
whole_number MASTER_PORT 1
whole_number MAX_RESTARTS 0
[[ -z $NODE_RANK ]] || whole_number NODE_RANK 0
((NODE_RANK < most)) || fail "NODE_RANK is $NODE_RANK, but of NNODES=$most machines the last is $((most - 1))"
((most == 1)) || [[ -n $MASTER_ADDR ]] || fail "NNODES=$most needs MASTER_ADDR, the name or address of machine 0"
[[ -z $NGPU ]] || whole_number NGPU 1
[[ -z $STOP_FILE || -d $(dirname "$STOP_FILE") ]] || fail "STOP_FILE=$STOP_FILE is in a folder that does not exist"

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"
# shellcheck disable=SC2119
setup_python

NGPU=${NGPU:-$(count_gpus)}
((NGPU > 0)) || NGPU=1
# Fewer failures for want of memory at the same peak use.
[[ -n ${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=expandable_segments:True

if ((NGPU == 1 && most == 1 && MAX_RESTARTS == 0)) && [[ -z $STOP_FILE ]]; then
  exec "$PYTHON" -m trainer train "$@"
fi

if ((most == 1)); then
  rendezvous=(--rdzv-endpoint localhost:0 --local-addr localhost)
else
  # Machine 0 may take minutes to come up; the others would give up after one.
  conf=read_timeout=600${PET_RDZV_CONF:+,$PET_RDZV_CONF}
  [[ -z $NODE_RANK ]] || conf+=,is_host=$((NODE_RANK == 0))
  rendezvous=(--rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RDZV_ID" --rdzv-conf "$conf")
  [[ -z ${LOCAL_ADDR:-} ]] || rendezvous+=(--local-addr "$LOCAL_ADDR")
fi
# A store for each start. In torchrun's own, restarted workers find the addresses of the dead; and machines, which count
# a restart differently (a failure where it happened, a new member elsewhere), do not find each other.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > NGPU ? cores / NGPU : 1))
fi
logs=$(mktemp -d "${TMPDIR:-/tmp}/titanrepa.XXXXXX")

# A signal makes torchrun kill its workers, and Slurm sends one to every process of a job. This one ignores all but
# SIGQUIT and SIGUSR2; handlers that do nothing, unlike ignored signals, are not inherited by the workers.
torchrun='
import signal
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda *_: None)
from torch.distributed.run import main
main()
'

recorded=$(stops)
for name in INT TERM HUP USR1; do
  # shellcheck disable=SC2064 # the name of now
  trap "stop $name" "$name"
done
# Job control puts torchrun into a process group of its own, out of reach of Ctrl-C; stop() tells the workers alone,
# they finish the step, save and end, and torchrun ends with them.
set -m
"$PYTHON" -c "$torchrun" --nnodes "$fewest:$most" --nproc-per-node "$NGPU" --max-restarts "$MAX_RESTARTS" \
  --rdzv-backend c10d "${rendezvous[@]}" --signals-to-handle SIGQUIT,SIGUSR2 --log-dir "$logs" \
  --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 -m trainer train "$@" </dev/null &
launcher=$!
set +m
while
  interrupted=0
  status=0
  wait "$launcher" || status=$?
  ((interrupted && status > 128)) # a signal ended the wait, not torchrun
do :; done
attempts=("$logs"/*/attempt_*) # counted from 0
if ((status == 0 && ${#attempts[@]} == 1)); then
  rm -rf "$logs"
elif ((status == 0)); then
  printf 'run_train.sh: processes died and were restarted; all that each printed is in %s\n' "$logs" >&2
else
  {
    # The process that failed first is often not one whose output was shown, and torchrun's own report is long.
    words=
    for file in "$logs"/*/attempt_$((${#attempts[@]} - 1))/*/stderr.log; do
      [[ -s $file ]] || continue
      before=$words
      words=$(tail -c 2000 "$file" | tr '\r' '\n' | tail -n 5)
      [[ $words == "$before" ]] || printf '\nLast words of process %s:\n%s\n' "$(basename "${file%/*}")" "$words"
    done
    printf 'run_train.sh: ended with status %s; all that each process printed is in %s\n' "$status" "$logs"
  } >&2
fi
if ((status == 0)) && [[ $(stops) != "$recorded" ]]; then
  status=75
fi
exit "$status"
