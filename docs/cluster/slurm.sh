#!/usr/bin/env bash
# sbatch docs/cluster/slurm.sh train_configs/repae_sit_xl.toml [--section.key=value ...]
#
# Submit from the repository. The repository, the data and outputs/ must be on a file system that all nodes share.
# Before the time limit and at preemption, the run saves a checkpoint and the job is requeued to resume from it. The job
# ends when training completes or fails. Preemption needs PreemptMode=REQUEUE: with CANCEL, Slurm ends the job for good
# (scontrol show config | grep PreemptMode; sacctmgr show qos format=name,preemptmode). Adapt these lines:
#SBATCH --job-name=titanrepa
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
# One task per node: run_train.sh starts a process per GPU itself.
#SBATCH --ntasks-per-node=1
# Seconds before the time limit; must allow for one step and one save.
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
  # srun forwards USR1 to all nodes; on TERM it would kill the tasks.
  [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap stop USR1 TERM

# Slurm runs a copy of this file in another folder.
cd "$SLURM_SUBMIT_DIR"
if [[ ! -x run_train.sh ]]; then
  echo "slurm.sh: no run_train.sh in $PWD; submit from the repository" >&2
  exit 2
fi

# Set up once here, not on all nodes at the same time.
# shellcheck source=../../trainer/setup_env.sh
source trainer/setup_env.sh
setup_python

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#nodes[@]} MASTER_ADDR=${nodes[0]}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MAX_RESTARTS=${MAX_RESTARTS:-3}
# At preemption Slurm may signal only the nodes and not this script; they then write this file.
export STOP_FILE=$PWD/slurm-$SLURM_JOB_ID.stop
rm -f "$STOP_FILE"
# NCCL and gloo choose a network interface themselves. To override their choice:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

status=0
if [[ -z $stopped ]]; then
  # Since Slurm 22.05, srun does not inherit --cpus-per-task; run_train.sh divides these cores among its processes.
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
# scancel removes a job from RUNNING at once: do not requeue it.
if [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") != *" JobState=RUNNING "* ]]; then
  exit "$status"
fi
echo "slurm.sh: stopped by a signal; requeueing job $SLURM_JOB_ID"
scontrol requeue "$SLURM_JOB_ID"
