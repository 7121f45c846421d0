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

Exit status: 0 complete, or stopped by a signal and saved; 1 an unexpected error; 2 an error that the message explains;
3 complete, but with the problems that the last line names; 75 stopped, with STOP_FILE; 128 + n ended by signal n before
the first step or at once. Linux and macOS; on Windows, WSL 2.

Environment:
  PYTHON       the Python to use, if it has every package, or to make .venv with (default: python3)
  NGPU         processes on this machine (default: its GPUs, or 1); also works without GPUs, over gloo
  LOG_RANK     local ranks whose output is shown, such as 0,3 (default: 0)
  OMP_WAIT_POLICY, GOMP_SPINCOUNT
               how a CPU's threads wait for each other (default: they sleep, OMP_WAIT_POLICY=passive, where other
               processes want this machine's cores at the start; else PyTorch's default: they spin first)

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

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  '')
    usage >&2
    exit 2
    ;;
esac

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"

# shellcheck disable=SC2317 # called by setup_python
before_installation() { # PYTHON: wrong arguments or variables are reported before minutes of installation, not after
  PYTHONPATH=$root "$1" -S -m trainer.launch check "${arguments[@]}" || exit
}

arguments=("$@")
# shellcheck disable=SC2119
setup_python
# The launcher needs no packages: without them (-S) it starts sooner.
exec "$PYTHON" -S -m trainer.launch start "$@"
