#!/usr/bin/env bash
# sbatch docs/cluster/slurm.sh train_configs/repae_sit_xl.toml [--section.key=value ...]
#
# To be submitted from the repository, which lies, as do the data and outputs/, on a disk that all nodes share. Before
# the time limit and at preemption the run saves and the job goes back into the queue, to go on from there; it ends for
# good when training is complete or fails. Change the lines that your cluster needs otherwise:
#SBATCH --job-name=titanrepa
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
# One task per node: run_train.sh starts a process per GPU itself.
#SBATCH --ntasks-per-node=1
# Seconds before the time limit; one step and one save must fit.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

step=
stopped=
interrupted=
# shellcheck disable=SC2317 # called by trap
stop() {
  stopped=1
  interrupted=1
  # srun hands USR1 on to all nodes; at TERM it would kill them.
  [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap stop USR1 TERM

# Slurm runs a copy of this file from another folder.
cd "$SLURM_SUBMIT_DIR"
if [[ ! -x run_train.sh ]]; then
  echo "slurm.sh: there is no run_train.sh in $PWD; submit from the repository" >&2
  exit 2
fi

# Here, once, instead of on all nodes at the same time.
# shellcheck source=../../trainer/setup_env.sh
source trainer/setup_env.sh
setup_python

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#nodes[@]} MASTER_ADDR=${nodes[0]}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MAX_RESTARTS=${MAX_RESTARTS:-3}
# At preemption Slurm may tell the nodes alone, not this script; they leave word here.
export STOP_FILE=$PWD/slurm-$SLURM_JOB_ID.stop
rm -f "$STOP_FILE"
# NCCL and gloo choose a network interface themselves. Where they choose wrongly:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

status=0
if [[ -z $stopped ]]; then
  # srun does not inherit --cpus-per-task from Slurm 22.05 on; run_train.sh shares these cores among its processes.
  # shellcheck disable=SC2016 # expanded on the nodes
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID LOCAL_ADDR=$SLURMD_NODENAME exec ./run_train.sh "$@"' bash "$@" &
  step=$!
  while
    interrupted=
    status=0
    wait "$step" || status=$?
    [[ -n $interrupted ]] && ((status > 128)) # a signal ended the wait, not srun
  do :; done
fi

if [[ -z $stopped && ! -s $STOP_FILE ]]; then
  exit "$status"
fi
rm -f "$STOP_FILE"
# scancel takes a job out of RUNNING at once, and means it.
if [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") != *" JobState=RUNNING "* ]]; then
  exit "$status"
fi
echo "slurm.sh: stopped by a signal; job $SLURM_JOB_ID goes back into the queue"
scontrol requeue "$SLURM_JOB_ID"
