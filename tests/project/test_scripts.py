"""run_train.sh and run_tests.sh: arguments, variables, and the commands they start."""

import re
import subprocess

import pytest

from tests.support import ROOT
from tests.support.script_stubs import Repository

PYTEST = "python3 -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"


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
    """All variables that the launcher reads, except those of other programs."""
    code = "".join((ROOT / "trainer" / "launch" / file).read_text() for file in ("__main__.py", "settings.py"))
    usage = repo.run("run_train.sh", "--help").stdout
    theirs = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TMPDIR", "PWD", "WORLD_SIZE", "RANK"}
    theirs |= {"LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"}
    theirs |= {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TITANREPA_STATUS_FILE"}
    names = set(re.findall(r"[\"']([A-Z][A-Z_]+\d?)[\"']", code)) - theirs
    assert {"PYTHON", "NGPU", "MAX_RESTARTS", "STOP_FILE", "LOCAL_ADDR", "PET_NNODES"} <= names
    for name in names:
        assert (name if not name.startswith("PET_") else "PET_ variables") in usage, name


@pytest.mark.parametrize("script", ["run_train.sh", "run_tests.sh", "trainer/setup_env.sh", "docs/cluster/slurm.sh"])
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("check", [0, 4])
def test_mistakes_are_reported_before_anything_is_installed_or_started(repo, check):
    repo.python("python3", check=check)

    def refused(*arguments, **env):
        result = repo.run("run_train.sh", *arguments, **env)
        assert result.returncode == 2
        assert set(repo.calls) == {"python3 check "}
        assert not (repo.root / ".venv").exists()
        return result.stderr

    told = refused("train_configs/b.toml")
    assert f"run_train.sh: there is no config file 'train_configs/b.toml' (looked from {repo.root}). Shipped" in told
    assert f"\n  {repo.root}/train_configs/a.toml\n" in told
    told = refused("--run.steps=3", "train_configs/a.toml")
    assert "first argument is the config file, not '--run.steps=3'" in told
    told = refused("train_configs/a.toml", NGPU="two")
    assert told == "run_train.sh: NGPU must be a whole number from 1 on, not 'two'\n"
    told = refused("train_configs/a.toml", STOP_FILE="nowhere/stop")
    assert "STOP_FILE=nowhere/stop is in a folder that does not exist" in told


def test_one_process_runs_the_trainer_itself_with_the_overrides_untouched(repo):
    repo.train("--run.name=a b", "--x.list=[1, 2]", "--empty=")
    assert repo.calls[-1] == "python3 -m trainer train train_configs/a.toml --run.name=a b --x.list=[1, 2] --empty="
    assert repo.seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "OMP_NUM_THREADS" not in repo.seen


def test_one_process_replaces_the_script(repo):
    """By exec: signals and the exit status are the trainer's own."""
    process = subprocess.Popen(
        [repo.root / "run_train.sh", "train_configs/a.toml"], env=repo.environment(), cwd=repo.root
    )
    assert process.wait(20) == 0
    assert repo.seen["PID"] == str(process.pid)


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
    repo.train("--a.b=c d", NGPU="2", LOG_RANK="0,1")
    call = repo.calls[-1]
    assert call.startswith("python3 torchrun --nnodes 1:1 --nproc-per-node 2 --max-restarts 0 --rdzv-backend c10d")
    assert "--local-ranks-filter 0,1 --role rank --tee 3" in call
    assert call.endswith("-m trainer train train_configs/a.toml --a.b=c d")
    assert repo.seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert repo.seen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(repo.seen["OMP_NUM_THREADS"]) >= 1


def test_one_process_on_each_of_several_machines_is_torchruns_too(repo):
    repo.train(NNODES="2", MASTER_ADDR="node0", RANK="1", WORLD_SIZE="2")
    assert "torchrun --nnodes 2:2 --nproc-per-node 1 " in repo.calls[-1]
    assert not {"RANK", "WORLD_SIZE"} & set(repo.seen)


def test_restarts_are_torchruns_even_for_one_process(repo):
    repo.train(MAX_RESTARTS="2")
    assert "torchrun --nnodes 1:1 --nproc-per-node 1 --max-restarts 2 " in repo.calls[-1]
    repo.train(STOP_FILE="stop")
    assert "--max-restarts 0 " in repo.calls[-1]


def test_logs_need_a_folder(repo, tmp_path):
    result = repo.run("run_train.sh", "train_configs/a.toml", NGPU="2", TMPDIR=str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert f"run_train.sh: cannot make a folder for logs in {tmp_path}/nowhere (TMPDIR)" in result.stderr


def test_a_process_is_started_per_gpu_that_is_visible(repo):
    smi = repo.bin / "nvidia-smi"
    smi.write_text('#!/usr/bin/env bash\nfor i in 0 1 2; do echo "GPU $i: X"; done\n')
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
    assert some.startswith(f"{with_oldest} tests/components/checkpoint/test_async_checkpoint.py ")
    assert slow == f"{with_oldest} -m slow"
    assert all((ROOT / file).exists() for file in some.split() if file.startswith("tests/"))


@pytest.mark.parametrize("failing", ["ruff_check", "ruff_format", "mypy", "pytest"])
def test_run_tests_fails_if_one_of_them_does_and_runs_them_all(repo, failing):
    repo.python("python3", **{failing: 5})
    assert repo.run(".ci/run").returncode == 5
    assert repo.calls[-1] == PYTEST  # CI ends there
