"""docs/cluster: slurm.sh requeues only when it should; pytorchjob.yaml is consistent with itself and run_train.sh."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.script_stubs import Repository as Scripts
from tests.support.script_stubs import wait_for

pytestmark = pytest.mark.long

SCRIPT = ROOT / "docs" / "cluster" / "slurm.sh"

# srun runs the command once per node in parallel and forwards USR1; TERM kills the tasks, as with the real srun.
STUBS = {
    "srun": """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
tasks=()
for i in 0 1; do
  SLURM_NODEID=$i SLURMD_NODENAME=node$((i + 7)) "$@" & tasks+=($!)
done
interrupted=
trap 'interrupted=1; kill -USR1 "${tasks[@]}" 2>/dev/null' USR1
trap 'kill -KILL "${tasks[@]}"; exit 137' TERM
worst=0
for task in "${tasks[@]}"; do
  while interrupted=; status=0; wait "$task" || status=$?; [[ -n $interrupted ]]; do :; done
  ((status <= worst)) || worst=$status
done
exit "$worst"
""",
    "scontrol": """#!/usr/bin/env bash
case $1 in
  show)
    case $2 in
      hostnames) printf 'node%s\\n' 7 8 ;;
      job) echo "JobId=5 JobName=titanrepa JobState=$(cat "$LOG.state" 2>/dev/null || echo RUNNING) Reason=None" ;;
    esac
    ;;
  *) echo "scontrol $*" >>"$LOG" ;;
esac
""",
}
# Stand-in for run_train.sh. Ends after SIGUSR1, or at once with status END if set.
TASK = """#!/usr/bin/env bash
{
  echo "task $NODE_RANK: $* NNODES=$NNODES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT LOCAL_ADDR=$LOCAL_ADDR" \\
    "MAX_RESTARTS=$MAX_RESTARTS STOP_FILE=$STOP_FILE"
} >>"$LOG"
trap 'echo "task $NODE_RANK saves" >>"$LOG"; sleep 0.2; echo "task $NODE_RANK saved" >>"$LOG"; exit 75' USR1 TERM
echo $$ >>"$LOG.pids"
echo "task $NODE_RANK ready" >>"$LOG"
[[ -z ${END:-} ]] || exit "$END"
while :; do sleep 0.02; done
"""


class Repository(Scripts):
    def __init__(self, folder):
        super().__init__(folder)
        (self.root / "run_train.sh").write_text(TASK)
        for name, text in STUBS.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        # Slurm runs a copy in its own folder.
        self.script = folder / "spool" / "slurm_script"
        self.script.parent.mkdir()
        shutil.copy(SCRIPT, self.script)

    def submit(self, *arguments, **env):
        slurm = {"SLURM_SUBMIT_DIR": str(self.root), "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[7-8]"}
        return subprocess.Popen(
            [self.script, "train_configs/a.toml", *arguments],
            cwd=self.script.parent,
            env=self.environment(SLURM_CPUS_PER_TASK="64", **slurm, **env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
        )

    def signal_tasks(self, number):
        pids = Path(f"{self.log}.pids")
        for pid in pids.read_text().split() if pids.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)

    @property
    def requeued(self):
        return "scontrol requeue 5" in self.calls


@pytest.fixture
def repo(tmp_path):
    repo = Repository(tmp_path)
    yield repo
    repo.signal_tasks(signal.SIGKILL)
    for line in repo.calls:
        assert "srun" not in line or "--kill-on-bad-exit=1" in line


def running(repo, **env):
    job = repo.submit(**env)
    wait_for(repo, "task 0 ready", "task 1 ready")
    return job


def end(job, status):
    out, err = job.communicate(timeout=20)
    assert job.returncode == status, out + err
    return out


def test_every_node_is_started_once_and_told_where_to_meet(repo):
    end(repo.submit("--run.name=a b", END="0"), 0)
    values = "NNODES=2 MASTER_ADDR=node7 MASTER_PORT=20005"
    stop = f"MAX_RESTARTS=3 STOP_FILE={repo.root}/slurm-5.stop"
    tasks = sorted(call for call in repo.calls if call.startswith("task") and "ready" not in call)
    assert tasks == [
        f"task {i}: train_configs/a.toml --run.name=a b {values} LOCAL_ADDR=node{i + 7} {stop}" for i in range(2)
    ]
    assert any(call.startswith("srun --cpus-per-task=64 ") for call in repo.calls)


def test_the_environment_is_set_up_once_before_the_nodes_start(repo):
    repo.python("python3", check=4)
    end(repo.submit(END="0"), 0)
    installs = [i for i, call in enumerate(repo.calls) if "pip install" in call]
    starts = [i for i, call in enumerate(repo.calls) if call.startswith("srun")]
    assert len(installs) == len(starts) == 1 and installs < starts


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_complete_or_failed_run_is_not_requeued(repo, status):
    end(repo.submit(END=str(status)), status)
    assert not repo.requeued


def test_before_the_time_limit_the_nodes_save_then_the_job_is_requeued(repo):
    job = running(repo)
    job.send_signal(signal.SIGUSR1)
    assert "requeueing job 5" in end(job, 0)
    assert repo.calls[-1] == "scontrol requeue 5"
    assert {"task 0 saved", "task 1 saved"} <= set(repo.calls)


def test_preemption_that_the_nodes_alone_hear_of_requeues_too(repo):
    job = running(repo)
    (repo.root / "slurm-5.stop").write_text("node8: SIGTERM\n")  # as run_train.sh does
    repo.signal_tasks(signal.SIGTERM)
    end(job, 0)
    assert repo.requeued
    assert not (repo.root / "slurm-5.stop").exists()


def test_the_stop_file_of_an_earlier_life_counts_for_nothing(repo):
    (repo.root / "slurm-5.stop").write_text("node8: SIGTERM\n")
    end(repo.submit(END="0"), 0)
    assert not repo.requeued


def test_a_cancelled_job_stays_cancelled(repo):
    job = running(repo)
    with open(f"{repo.log}.state", "w") as file:
        file.write("CANCELLED\n")
    job.send_signal(signal.SIGTERM)
    end(job, 75)
    assert not repo.requeued


def test_a_signal_during_the_set_up_requeues_without_starting_anything(repo):
    repo.python("python3", check=4)
    repo.python(".venv", slow=1)
    job = repo.submit()
    until = time.monotonic() + 20
    while not any("pip install" in call for call in repo.calls):
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    end(job, 0)
    assert repo.requeued and not any(call.startswith("srun") for call in repo.calls)


def test_a_wrong_folder_is_named(repo, tmp_path):
    job = subprocess.run(
        [repo.script], env=repo.environment(SLURM_SUBMIT_DIR=str(tmp_path)), capture_output=True, text=True, timeout=20
    )
    assert job.returncode == 2
    assert f"no run_train.sh in {tmp_path}; submit from the repository" in job.stderr


# -- options --------------------------------------------------------------------------------------------------------


def test_slurm_is_asked_to_warn_early_and_to_keep_the_log():
    lines = SCRIPT.read_text().splitlines()
    assert lines[1].startswith("# sbatch docs/cluster/slurm.sh train_configs/")
    # sbatch ignores options after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(re.match(r"#SBATCH --([\w-]+)=?(.*)", line).groups() for line in lines if "#SBATCH" in line)
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "8" and int(options["nodes"]) > 1
    assert re.fullmatch(r"B:USR1@\d{3,}", options["signal"])
    assert options["open-mode"] == "append" and "requeue" in options


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((ROOT / "docs" / "cluster" / "pytorchjob.yaml").read_text())


def test_the_pytorchjob_agrees_with_itself(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] >= 2 and worker["restartPolicy"] == "OnFailure"
    assert spec["elasticPolicy"]["rdzvBackend"] == "c10d" and spec["elasticPolicy"]["maxRestarts"] > 0
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    # The operator's API requires a string.
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"]) == "8"
    assert container["ports"] == [
        {"name": "pytorchjob-port", "containerPort": spec["elasticPolicy"]["rdzvPort"]},
    ]
    assert pod["terminationGracePeriodSeconds"] >= 120
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts[f"{container['workingDir']}/outputs"]]
    assert "persistentVolumeClaim" in volumes[mounts[f"{container['workingDir']}/data"]]


def test_the_pytorchjob_starts_what_exists(job):
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    (script,) = container["command"]
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / container["args"][0]).is_file()
    usage = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
    for variable in container["env"]:
        assert variable["name"] in usage
    (stop,) = (variable["value"] for variable in container["env"] if variable["name"] == "STOP_FILE")
    # On the shared volume, through which the machines signal each other.
    assert f"{container['workingDir']}/{stop}".startswith(f"{container['workingDir']}/outputs/")
