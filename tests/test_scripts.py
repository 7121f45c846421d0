"""run_train.sh and run_tests.sh: arguments, variables, and the commands they start."""

import re
import subprocess

import pytest

from tests.script_stubs import ROOT, Repository

PYTEST = "python3 -m pytest -n auto --maxprocesses 4 --dist loadfile"


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path)


def test_usage_is_shown_without_setting_anything_up(repo):
    for arguments, status in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = repo.run("run_train.sh", *arguments)
        assert result.returncode == status
        text = result.stdout + result.stderr
        for word in ("CONFIG", "--section.key=value", "Examples"):
            assert word in text
    assert repo.calls == []


def test_the_usage_names_every_variable(repo):
    """All variables with a default in the script, except those of other programs."""
    script = (ROOT / "run_train.sh").read_text()
    usage = repo.run("run_train.sh", "--help").stdout
    theirs = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TMPDIR", "BASH_SOURCE"}
    names = set(re.findall(r"\$\{([A-Z_]+):[-+]", script)) - theirs
    assert {"NGPU", "MAX_RESTARTS", "STOP_FILE", "LOCAL_ADDR"} <= names
    for name in names:
        assert (name if not name.startswith("PET_") else "PET_ variables") in usage, name


@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh", "trainer/setup_env.sh", "docs/cluster/slurm.sh"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True).stderr == ""


def test_a_missing_config_lists_those_that_exist(repo):
    result = repo.run("run_train.sh", "train_configs/b.toml")
    assert result.returncode == 2
    assert "no config file 'train_configs/b.toml'" in result.stderr
    assert f"{repo.root}/train_configs/a.toml" in result.stderr
    assert repo.calls == []
    result = repo.run("run_train.sh", "--run.steps=3", "train_configs/a.toml")
    assert result.returncode == 2
    assert "first argument is the config file, not '--run.steps=3'" in result.stderr


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NGPU": "0"}, "NGPU must be a whole number from 1 on, not '0'"),
        ({"NGPU": "two"}, "NGPU must be a whole number"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "2:x"}, "NNODES must be a whole number from 2 on, not 'x'"),
        ({"NNODES": "3:2"}, "NNODES must be a whole number from 3 on, not '2'"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be a whole number from 0 on, not '-1'"),
        ({"STOP_FILE": "nowhere/stop"}, "STOP_FILE=nowhere/stop is in a folder that does not exist"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "of NNODES=2 machines the last is 1"),
    ],
)
def test_wrong_variables_are_named(repo, env, words):
    result = repo.run("run_train.sh", "train_configs/a.toml", **env)
    assert result.returncode == 2
    assert words in result.stderr
    assert repo.calls == []


def test_one_process_runs_the_trainer_itself_with_the_overrides_untouched(repo):
    repo.train("--run.name=a b", "--x.list=[1, 2]", "--empty=")
    assert repo.calls[-1] == "python3 -m trainer train train_configs/a.toml --run.name=a b --x.list=[1, 2] --empty="
    assert repo.seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "OMP_NUM_THREADS" not in repo.seen


def test_the_repository_comes_before_the_callers_folder_and_pythonpath(repo, tmp_path):
    repo.train(PYTHONPATH="/elsewhere")
    assert repo.seen["PYTHONPATH"] == f"{repo.root}:/elsewhere:{repo.root}"
    link = tmp_path / "link"
    link.symlink_to(repo.root / "run_train.sh")
    (tmp_path / "mine.toml").touch()
    result = subprocess.run(["../link", "../mine.toml"], cwd=repo.bin, env=repo.environment(), timeout=60)
    assert result.returncode == 0
    assert repo.calls[-1] == "python3 -m trainer train ../mine.toml"
    assert repo.seen["PYTHONPATH"] == f"{repo.root}:{repo.bin}"
    assert repo.seen["PWD"] == str(repo.bin)
    assert repo.seen["PYTHONSAFEPATH"] == "1"


def test_settings_of_the_allocator_and_threads_are_respected(repo):
    repo.train(PYTORCH_CUDA_ALLOC_CONF="backend:native")
    assert "PYTORCH_ALLOC_CONF" not in repo.seen
    repo.train(NGPU="2", OMP_NUM_THREADS="7")
    assert repo.seen["OMP_NUM_THREADS"] == "7"


def test_several_processes_are_started_by_torchrun(repo):
    (repo.bin / "nproc").unlink()
    (repo.bin / "nproc").write_text("#!/usr/bin/env bash\necho 9\n")
    (repo.bin / "nproc").chmod(0o755)
    repo.train("--a.b=c d", NGPU="2", LOG_RANK="0,1")
    call = repo.calls[-1]
    assert call.startswith("python3 torchrun --nnodes 1:1 --nproc-per-node 2 --max-restarts 0 --rdzv-backend c10d")
    assert "--rdzv-endpoint localhost:0 --local-addr localhost" in call
    assert "--local-ranks-filter 0,1 --role rank --tee 3" in call
    assert call.endswith("-m trainer train train_configs/a.toml --a.b=c d")
    assert repo.seen["OMP_NUM_THREADS"] == "4"
    repo.train(NGPU="20")
    assert repo.seen["OMP_NUM_THREADS"] == "1"
    assert "--local-ranks-filter 0 " in repo.calls[-1]


def test_several_machines_meet_at_the_first(repo):
    repo.train(NNODES="2", MASTER_ADDR="node0")
    assert "--nnodes 2:2 --nproc-per-node 1 --max-restarts 0 --rdzv-backend c10d" in repo.calls[-1]
    assert "--rdzv-endpoint node0:29500 --rdzv-id titanrepa --rdzv-conf read_timeout=600 --sig" in repo.calls[-1]
    # Workers of one start must not join the store of another.
    assert repo.seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    repo.train(NNODES="2:4", NGPU="8", MASTER_ADDR="node0", MASTER_PORT="1234", RDZV_ID="a b", LOCAL_ADDR="node3")
    assert "--nnodes 2:4 --nproc-per-node 8" in repo.calls[-1]
    assert "--rdzv-endpoint node0:1234 --rdzv-id a b" in repo.calls[-1]
    assert "--local-addr node3" in repo.calls[-1]
    repo.train(NNODES="2", MASTER_ADDR="node0", SLURM_JOB_ID="17")
    assert "--rdzv-id 17 " in repo.calls[-1]


@pytest.mark.parametrize(("rank", "host"), [("0", "1"), ("1", "0")])
def test_node_rank_tells_who_hosts_the_meeting(repo, rank, host):
    repo.train(NNODES="2", MASTER_ADDR="node0", NODE_RANK=rank)
    assert f"--rdzv-conf read_timeout=600,is_host={host} " in repo.calls[-1]
    assert "--node-rank" not in repo.calls[-1]


def test_restarts_are_torchruns_even_for_one_process(repo):
    repo.train(MAX_RESTARTS="2")
    assert "torchrun --nnodes 1:1 --nproc-per-node 1 --max-restarts 2 " in repo.calls[-1]
    repo.train(STOP_FILE="stop")
    assert "--max-restarts 0 " in repo.calls[-1]


def test_kubeflows_variables_are_understood(repo):
    elastic = {
        "PET_NNODES": "2:2",
        "PET_NPROC_PER_NODE": "8",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "job-worker-0:23456",
        "PET_MAX_RESTARTS": "10",
        "PET_RDZV_CONF": "join_timeout=900",
    }
    repo.train(**elastic)
    assert "--nnodes 2:2 --nproc-per-node 8 --max-restarts 10 --rdzv-backend c10d" in repo.calls[-1]
    assert "--rdzv-endpoint job-worker-0:23456" in repo.calls[-1]
    assert "--rdzv-conf read_timeout=600,join_timeout=900 " in repo.calls[-1]
    with_master = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "1",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": "2",
        "RANK": "1",
    }
    repo.train(**with_master)
    assert "--nnodes 2:2 --nproc-per-node 1 " in repo.calls[-1]
    assert "--rdzv-endpoint job-master-0:23456" in repo.calls[-1]
    assert "is_host=0 " in repo.calls[-1]
    assert not {"PET_NODE_RANK", "WORLD_SIZE", "RANK"} & set(repo.seen)
    repo.train(NNODES="1", **elastic | {"PET_NPROC_PER_NODE": "1", "PET_MAX_RESTARTS": "0"})
    assert repo.calls[-1].startswith("python3 -m trainer")  # the user's own values take precedence


def test_gpus_are_counted(repo):
    smi = repo.bin / "nvidia-smi"
    smi.write_text("#!/usr/bin/env bash\nfor i in 0 1 2; do echo \"GPU $i: X\"; echo '  MIG 1g'; done\n")
    smi.chmod(0o755)
    repo.train()
    assert "--nproc-per-node 3 " in repo.calls[-1]
    repo.python("python3", devices=2)
    repo.train(CUDA_VISIBLE_DEVICES="0,2,-1")
    assert "--nproc-per-node 2 " in repo.calls[-1]
    repo.python("python3", devices=0)
    repo.train(CUDA_VISIBLE_DEVICES="")
    assert repo.calls[-1].startswith("python3 -m trainer")
    repo.train(NGPU="1")
    assert repo.calls[-1].startswith("python3 -m trainer")
    repo.python("python3", devices=5)  # not called: importing torch would take seconds
    smi.write_text("#!/usr/bin/env bash\necho 'has failed because it could not communicate with the driver'; exit 9\n")
    repo.train(CUDA_VISIBLE_DEVICES="0,1")
    assert repo.calls[-1].startswith("python3 -m trainer")


def test_run_tests_checks_the_style_and_runs_everything(repo):
    result = repo.run("run_tests.sh", "-k", "a b", cwd=repo.bin)
    assert result.returncode == 0, result.stderr
    assert repo.calls == [
        "python3 check test",
        "python3 -m ruff check .",
        "python3 -m ruff format --check .",
        "python3 -m mypy",
        f"{PYTEST} -k a b",
    ]


def test_ci_runs_the_newest_torch_then_the_oldest(repo):
    assert repo.run(".ci/run", cwd=repo.bin).returncode == 0
    newest, slow, *oldest = [call for call in repo.calls if "-m pytest" in call]
    assert [newest, slow] == [PYTEST, f"{PYTEST} -m slow"]
    assert ".venv-torch-2.11 -m pip install --quiet --disable-pip-version-check -e .[test] torch==2.11.*" in repo.calls
    with_oldest = PYTEST.replace("python3", ".venv-torch-2.11")
    some, slow = oldest
    assert some.startswith(f"{with_oldest} tests/test_alarms.py ") and slow == f"{with_oldest} -m slow"
    assert all((ROOT / file).exists() for file in some.split() if file.startswith("tests/"))


@pytest.mark.parametrize("failing", ["ruff_check", "ruff_format", "mypy", "pytest"])
def test_run_tests_fails_if_one_of_them_does_and_runs_them_all(repo, failing):
    repo.python("python3", **{failing: 5})
    assert repo.run(".ci/run").returncode == 5
    assert repo.calls[-1] == PYTEST  # CI ends there
