"""Evaluation during training matches sample + evaluate, on any number of ranks, without affecting the run."""

import json
from pathlib import Path

import pytest
import torch

from components.distributed.parallel import World
from tests.support import toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.evaluation import in_training
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

# 110 images in batches of 24: the last round is neither full nor divisible by the ranks.
TOML = (
    toys.TOML
    + """
[evaluation]
every = 2
images = 110
batch_size = 24
metrics = []
encoders = ["tiny_vit"]
"""
)
OPTIONS = ["--dataset.size=120", "--training.steps=4", "--run.checkpoint_every=0"]


def train(rank: int, world: int, folder: Path, *options: str) -> Trainer:
    torch.set_num_threads(1)
    toml = folder.parent / f"toy{rank}.toml"
    toml.write_text(TOML)
    trainer = Trainer(config.load(str(toml), [f"--run.dir={folder}", *OPTIONS, *options]), World(rank, world))
    trainer.run()
    return trainer


def _on_rank(rank: int, world: int, folder: str) -> None:
    train(rank, world, Path(folder), "--training.steps=2")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def distances(folder: Path) -> dict[int, float]:
    return {x["step"]: x["evaluation/fd_tiny_vit"] for x in lines(folder) if "evaluation/fd_tiny_vit" in x}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    train(0, 1, folder)
    return folder


def test_the_number_is_that_of_sample_and_evaluate(run, tmp_path):
    assert set(distances(run)) == {2, 4}
    assert main(["sample", str(run), "--num-samples=110", "--batch-size=24", f"--out={tmp_path}"]) == 0
    assert main(["evaluate", str(tmp_path), "--reference=dataset", "--encoder=tiny_vit", "--batch-size=24"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]["fd_tiny_vit"]
    assert distances(run)[4] == pytest.approx(found, rel=1e-4)


def test_training_does_not_notice(run, tmp_path):
    train(0, 1, tmp_path / "run", "--evaluation.every=0")

    def losses(folder: Path) -> list[float]:
        return [x["denoiser/loss"] for x in lines(folder) if "denoiser/loss" in x]

    assert losses(tmp_path / "run") == losses(run) and not distances(tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_sharded_ranks_stay_in_step_and_give_the_same_number(run, tmp_path):
    run_ranks(_on_rank, 2, str(tmp_path / "run"))
    assert distances(tmp_path / "run") == {2: pytest.approx(distances(run)[2], rel=1e-3)}
    assert [p.name for p in (tmp_path / "run" / "evaluation").iterdir()] == [
        p.name for p in (run / "evaluation").iterdir()
    ]  # the reference's name contains a fingerprint of its settings


def test_a_resumed_run_uses_the_reference_that_it_kept(run, monkeypatch):
    def measured_again(*args, **kwargs):
        raise AssertionError("the reference was measured again")

    monkeypatch.setattr(in_training, "compute_statistics", measured_again)
    before = distances(run)
    train(0, 1, run, "--training.steps=6")
    assert distances(run) == before | {6: pytest.approx(before[4], rel=0.5)}
    # Other images make another reference.
    with pytest.raises(AssertionError, match="measured again"):
        train(0, 1, run, "--training.steps=8", "--dataset.size=130")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--evaluation.inception_weights=nowhere.pth", '--evaluation.metrics=["fid"]'], r"nowhere.pth.* do not exist"),
        (["--evaluation.images=90"], r"90 images of the samples are too few for 96 features"),
        (["--evaluation.reference_images=90"], r"90 images of the reference are too few for 96"),
        (["--evaluation.reference=nowhere.npz"], r"nowhere.npz"),
        (["--evaluation.encoders=[]"], r"evaluation.metrics and evaluation.encoders are empty"),
        (["--recipe.name=tokenizer"], r"recipe 'tokenizer' has no denoiser"),
        (['--evaluation.metrics=["fidd"]'], r"evaluation.metrics.0 = 'fidd': not allowed; did you mean 'fid'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(0, 1, tmp_path / "run", *options)
    assert not list(tmp_path.glob("run/checkpoints/*"))
