"""trainer/launch: what the variables of run_train.sh mean to torchrun, and what is said of its end."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from trainer.launch import __main__ as launch
from trainer.launch import torchrun
from trainer.launch.settings import Settings, UsageError, change_environment, competitors, torchrun_command


def command(*arguments: str, **env: str) -> str:
    """torchrun's command line under these variables, without Python and the program."""
    settings = Settings.read(env)
    words = torchrun_command("python3", settings, settings.processes or 1, "logs", arguments)
    assert words[:2] == ["python3", "-c"]
    return " ".join(words[3:])


def test_it_needs_the_standard_library_alone():
    """It runs before any package is installed, and must not delay what it starts."""
    code = "import sys, trainer.launch.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__main__"} == {"trainer"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NGPU": "0"}, "NGPU must be a whole number from 1 on, not '0'"),
        ({"NGPU": "two"}, "NGPU must be a whole number from 1 on, not 'two'"),
        ({"NGPU": "1234567"}, "NGPU must be a whole number from 1 on, not '1234567'"),
        ({"PET_NPROC_PER_NODE": "cpu"}, "NGPU must be a whole number from 1 on, not 'cpu'"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "x"}, "NNODES must be a whole number from 1 on, not 'x'"),
        ({"NNODES": "2:"}, "NNODES must be a whole number from 2 on, not ''"),
        ({"NNODES": "2:x"}, "NNODES must be a whole number from 2 on, not 'x'"),
        ({"NNODES": "3:2"}, "NNODES must be a whole number from 3 on, not '2'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 1 on, not 'http'"),
        ({"PET_RDZV_ENDPOINT": "node0"}, "MASTER_PORT must be a whole number from 1 on, not 'node0'"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be a whole number from 0 on, not '-1'"),
        ({"STOP_FILE": "nowhere/stop"}, "STOP_FILE=nowhere/stop is in a folder that does not exist"),
        ({"NODE_RANK": "first"}, "NODE_RANK must be a whole number from 0 on, not 'first'"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "of NNODES=2 machines the last is 1"),
    ],
)
def test_wrong_variables_are_named(env, words):
    with pytest.raises(UsageError) as error:
        Settings.read(env)
    assert words in str(error.value)


def test_empty_variables_count_as_unset():
    names = ("NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "STOP_FILE", "RDZV_ID")
    assert Settings.read(dict.fromkeys((*names, "LOCAL_ADDR", "LOG_RANK", "SLURM_JOB_ID"), "")) == Settings.read({})


def test_one_machine_meets_itself_at_a_free_port():
    words = command("a.toml", "--a.b=c", NGPU="2", LOG_RANK="0,1")
    assert words.startswith("--nnodes 1:1 --nproc-per-node 2 --max-restarts 0 --rdzv-backend c10d")
    assert "--rdzv-endpoint localhost:0 --local-addr localhost --sig" in words
    assert "--signals-to-handle SIGQUIT,SIGUSR2 --log-dir logs --local-ranks-filter 0,1 --role rank --tee 3" in words
    assert words.endswith("-m trainer train a.toml --a.b=c")
    assert "--local-ranks-filter 0 " in command(NGPU="2")


def test_several_machines_meet_at_the_first():
    words = command(NNODES="2", MASTER_ADDR="node0")
    assert words.startswith("--nnodes 2:2 --nproc-per-node 1 --max-restarts 0 --rdzv-backend c10d")
    assert "--rdzv-endpoint node0:29500 --rdzv-id titanrepa --rdzv-conf read_timeout=600 --sig" in words
    words = command(NNODES="2:4", NGPU="8", MASTER_ADDR="node0", MASTER_PORT="1234", RDZV_ID="a b", LOCAL_ADDR="node3")
    assert words.startswith("--nnodes 2:4 --nproc-per-node 8")
    assert "--rdzv-endpoint node0:1234 --rdzv-id a b" in words
    assert "--local-addr node3" in words
    assert "--rdzv-id 17 " in command(NNODES="2", MASTER_ADDR="node0", SLURM_JOB_ID="17")


@pytest.mark.parametrize(("rank", "host"), [("0", "1"), ("1", "0")])
def test_node_rank_tells_who_hosts_the_meeting(rank, host):
    words = command(NNODES="2", MASTER_ADDR="node0", NODE_RANK=rank)
    assert f"--rdzv-conf read_timeout=600,is_host={host} " in words
    assert "--node-rank" not in words


ELASTIC = {
    "PET_NNODES": "2:2",
    "PET_NPROC_PER_NODE": "8",
    "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "job-worker-0:23456",
    "PET_MAX_RESTARTS": "10",
    "PET_RDZV_CONF": "join_timeout=900",
}


def test_variables_of_a_kubeflow_job_are_understood():
    words = command(**ELASTIC)
    assert words.startswith("--nnodes 2:2 --nproc-per-node 8 --max-restarts 10 --rdzv-backend c10d")
    assert "--rdzv-endpoint job-worker-0:23456" in words
    assert "--rdzv-conf read_timeout=600,join_timeout=900 " in words
    assert "--rdzv-id job " in command(**ELASTIC, PET_RDZV_ID="job", SLURM_JOB_ID="17")


def test_variables_of_a_kubeflow_job_with_a_master_are_understood():
    env = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "1",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "0",
    }
    words = command(**env)
    assert "--nnodes 2:2 --nproc-per-node 1 " in words
    assert "--rdzv-endpoint job-master-0:23456" in words
    assert "is_host=0 " in words
    # About machines or all processes; to torchrun and its processes they would mean something else.
    change_environment(env)
    assert not {"PET_NODE_RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(env)


def test_the_users_own_variables_win():
    own = {"NNODES": "1", "NGPU": "3", "MAX_RESTARTS": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "RDZV_ID": "mine"}
    settings = Settings.read(ELASTIC | {"PET_RDZV_ID": "job"} | own)
    assert (settings.max_nodes, settings.processes, settings.max_restarts) == (1, 3, 0)
    assert (settings.master, settings.rdzv_id) == ("a:1", "mine")


def test_threads_sleep_where_other_processes_want_their_cores(monkeypatch):
    monkeypatch.setattr("trainer.launch.settings.available_cores", lambda: 2)
    monkeypatch.setattr("trainer.launch.settings.os.cpu_count", lambda: 4)

    def environment(competitors: int, **env: str) -> dict[str, str]:
        monkeypatch.setattr("trainer.launch.settings.competitors", lambda: competitors)
        change_environment(env)
        return env

    assert environment(3)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in environment(2), "two cores are not ours"
    assert environment(3, OMP_WAIT_POLICY="active")["OMP_WAIT_POLICY"] == "active"
    assert "OMP_WAIT_POLICY" not in environment(3, GOMP_SPINCOUNT="1000")


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="needs Linux")
def test_competitors_are_counted():
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    with busy:
        busy.stdout.readline()
        found = competitors()
        busy.kill()
    assert found >= 1


def test_cores_are_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr("trainer.launch.settings.available_cores", lambda: 9)
    for processes, threads in ((2, "4"), (9, "1"), (20, "1")):
        env = {}
        launch.change_torchrun_environment(env, processes)
        assert env["OMP_NUM_THREADS"] == threads
    env = {"OMP_NUM_THREADS": "7"}
    launch.change_torchrun_environment(env, 2)
    assert env["OMP_NUM_THREADS"] == "7"
    # Workers of one start must not meet the store of another.
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def stub(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_gpus_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    never = stub(tmp_path / "never", "exit 1")  # importing torch would cost seconds
    assert launch.count_gpus(never, {}) == 0 or os.path.exists("/dev/kfd")
    stub(tmp_path / "nvidia-smi", "for i in 0 1 2; do echo \"GPU $i: X\"; echo '  MIG 1g'; done")
    assert launch.count_gpus(never, {}) == 3
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        assert launch.count_gpus(stub(tmp_path / "two", "echo 2"), {name: "0,2,-1"}) == 2
        assert launch.count_gpus(stub(tmp_path / "none", "echo 0"), {name: ""}) == 0
    assert launch.count_gpus(never, {"CUDA_VISIBLE_DEVICES": "0"}) == 0
    stub(tmp_path / "nvidia-smi", "echo 'has failed because it could not communicate with the driver'; exit 9")
    assert launch.count_gpus(stub(tmp_path / "five", "echo 5"), {"CUDA_VISIBLE_DEVICES": "0"}) == 0


def log(folder: Path, attempt: int, rank: int, text: bytes) -> None:
    path = folder / "job" / f"attempt_{attempt}" / str(rank) / "stderr.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def test_a_failure_shows_the_last_words_of_the_last_attempt(tmp_path, capfd):
    log(tmp_path, 0, 0, b"of the first attempt\n")
    for rank, words in enumerate([b"no such file\n", b"no such file\n", b"10%\r20%\rout of \xffmemory\n", b""]):
        log(tmp_path, 1, rank, words and b"line\n" * 1000 + words)
    launch.summarize(3, tmp_path)
    said = capfd.readouterr().err.encode(errors="surrogateescape").decode(errors="replace")
    lines = "line\n" * 4
    assert said == (
        f"\nLast words of process 0:\n{lines}no such file\n"
        "\nLast words of process 2:\nline\nline\n10%\n20%\nout of \ufffdmemory\n"
        f"run_train.sh: ended with status 3; all that each process printed is in {tmp_path}\n"
    )


@pytest.mark.parametrize("status", [2, 143])
@pytest.mark.parametrize("shown", ["0", "1", "0,1"])
def test_an_explained_end_shows_the_message_alone_and_once(tmp_path, capfd, status, shown):
    message = b"error: no such key" if status == 2 else b"interrupted (SIGTERM); repeat the command to resume"
    log(tmp_path, 0, 0, b"")
    log(tmp_path, 0, 1, b"line\n" * 20 + message + b"\n")
    launch.summarize(status, tmp_path, shown)
    assert capfd.readouterr().err == ("" if "1" in shown else message.decode() + "\n")
    assert not tmp_path.exists()


def test_the_logs_of_a_run_without_failures_are_deleted(tmp_path, capfd):
    restarted, whole = tmp_path / "restarted", tmp_path / "whole"
    for folder, attempts in ((restarted, 2), (whole, 1)):
        for attempt in range(attempts):
            log(folder, attempt, 0, b"words\n")
        launch.summarize(0, folder)
    said = f"run_train.sh: processes died and were restarted; all that each printed is in {restarted}\n"
    assert capfd.readouterr().err == said
    assert restarted.exists() and not whole.exists()


def test_a_stop_file_that_cannot_be_written_costs_a_warning(tmp_path, capfd):
    torchrun.record_stop(str(tmp_path), signal.SIGTERM)
    assert "cannot write to STOP_FILE" in capfd.readouterr().err


@pytest.mark.parametrize("proc", [True, False])
def test_the_workers_are_found(proc, monkeypatch):
    """By /proc, or by pgrep where a system has none."""
    if not (os.path.exists("/proc/self/stat") if proc else shutil.which("pgrep")):
        pytest.skip("not on this machine")
    process = subprocess.Popen(["sleep", "60"])
    try:
        exists = os.path.exists
        monkeypatch.setattr(
            os.path, "exists", lambda path: exists(path) if proc or path != "/proc/self/stat" else False
        )
        assert process.pid in torchrun.children(os.getpid())
        assert torchrun.children(process.pid) == []
    finally:
        process.kill()
        process.wait()
