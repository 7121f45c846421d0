"""Evaluation during training matches sample + evaluate, on any number of ranks, without affecting the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from components.data.pixels import to_float
from components.distributed.parallel import World
from plugins.datasets.shapes import Shapes
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
    train(rank, world, Path(folder), "--training.steps=2", *MORE)


# The metrics that need the dataset's judge, and those of reconstructions.
MORE = [
    '--evaluation.metrics=["fd_judge", "judged_right"]',
    '--evaluation.reconstruction=["psnr", "ssim", "rfd", "rfd_judge"]',
    "--evaluation.reconstruction_images=105",
    '--evaluation.heldout={split = "heldout"}',
]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluations(folder: Path) -> dict[int, dict]:
    found = {x["step"]: x for x in lines(folder) if "evaluation/fd_judge" in x}
    return {
        step: {key: value for key, value in x.items() if key.startswith("evaluation/")} for step, x in found.items()
    }


def distances(folder: Path) -> dict[int, float]:
    return {x["step"]: x["evaluation/fd_tiny_vit"] for x in lines(folder) if "evaluation/fd_tiny_vit" in x}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    train(0, 1, folder, *MORE)
    return folder


def test_the_number_is_that_of_sample_and_evaluate(run, tmp_path):
    assert set(distances(run)) == {2, 4}
    assert main(["sample", str(run), "--num-samples=110", "--batch-size=24", f"--out={tmp_path}"]) == 0
    assert main(["evaluate", str(tmp_path), "--reference=dataset", "--encoder=tiny_vit", "--batch-size=24"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]["fd_tiny_vit"]
    assert distances(run)[4] == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("labels", ["random", "dataset"])
def test_the_classes_of_the_samples_are_those_of_sample(tmp_path, labels):
    # A large step away from the initial weights, for which labels have no effect.
    options = ["--training.steps=2", "--run.checkpoint_every=2", "--optimizer.denoiser.lr=0.1", "--ema.decay=0.5"]
    train(0, 1, tmp_path / "run", *options, f"--evaluation.labels={labels}", "--training.seed=5")
    found = {}
    for name in (labels, "balanced"):
        out = tmp_path / name
        words = ["--num-samples=110", "--batch-size=7", f"--labels={name}", "--seed=5", f"--out={out}"]
        assert main(["sample", str(tmp_path / "run"), *words]) == 0
        assert main(["evaluate", str(out), "--reference=dataset", "--encoder=tiny_vit", "--batch-size=24"]) == 0
        found[name] = json.loads((out / "evaluation.json").read_text())["metrics"]["fd_tiny_vit"]
    assert distances(tmp_path / "run") == {2: pytest.approx(found[labels], rel=1e-4)}
    assert abs(found["balanced"] / found[labels] - 1) > 1e-3


def test_reconstructions_of_held_out_images_are_those_of_evaluate(run, tmp_path):
    output = tmp_path / "found.json"
    options = ["--metrics=psnr,ssim", "--encoder=tiny_vit", "--max-images=105", "--dataset.split=heldout"]
    assert main(["evaluate", str(run), "--reconstruction", f"--output={output}", *options]) == 0
    found = json.loads(output.read_text())["metrics"]
    here = evaluations(run)[4]
    for name in ("psnr", "ssim", "rfd_tiny_vit"):
        assert here[f"evaluation/{name}"] == pytest.approx(found[name], rel=1e-4)


def test_the_judge_is_the_datasets(run, tmp_path):
    assert main(["sample", str(run), "--num-samples=110", "--batch-size=24", f"--out={tmp_path}"]) == 0
    images = torch.from_numpy(np.load(tmp_path / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    here, data = evaluations(run)[4], Shapes(32, size=120)
    right = (data.judge(to_float(images)) == torch.arange(110) % 10).double().mean()
    assert here["evaluation/judged_right"] == pytest.approx(float(right))
    real = torch.stack([data[i].image for i in range(120)])
    a, b = (np.double(data.judge_features(to_float(x))) for x in (images, real))
    product = np.cov(a.T) @ np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(product).real, 0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    assert here["evaluation/fd_judge"] == pytest.approx(distance, rel=1e-3)


def test_a_tokenizer_is_evaluated_without_a_denoiser(tmp_path):
    options = ["--recipe.name=tokenizer", "--evaluation.metrics=[]", '--evaluation.reconstruction=["psnr"]']
    train(0, 1, tmp_path / "run", *options, "--evaluation.encoders=[]", "--training.steps=2")
    assert [x["evaluation/psnr"] > 0 for x in lines(tmp_path / "run") if "evaluation/psnr" in x] == [True]


def test_training_does_not_notice(run, tmp_path):
    train(0, 1, tmp_path / "run", "--evaluation.every=0")

    def losses(folder: Path) -> list[float]:
        return [x["denoiser/loss"] for x in lines(folder) if "denoiser/loss" in x]

    assert losses(tmp_path / "run") == losses(run) and not distances(tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation").exists()


def test_sharded_ranks_stay_in_step_and_give_the_same_number(run, tmp_path):
    run_ranks(_on_rank, 2, str(tmp_path / "run"))
    assert evaluations(tmp_path / "run") == {2: pytest.approx(evaluations(run)[2], rel=1e-3)}
    assert [p.name for p in (tmp_path / "run" / "evaluation").iterdir()] == [
        p.name for p in (run / "evaluation").iterdir()
    ]  # the reference's name contains a fingerprint of its settings


def test_a_resumed_run_uses_the_reference_that_it_kept(run, monkeypatch):
    def measured_again(*args, **kwargs):
        raise AssertionError("the reference was measured again")

    monkeypatch.setattr(in_training, "compute_statistics", measured_again)
    before = distances(run)
    train(0, 1, run, "--training.steps=6", *MORE)
    assert distances(run) == before | {6: pytest.approx(before[4], rel=0.5)}
    # Other images make another reference.
    with pytest.raises(AssertionError, match="measured again"):
        train(0, 1, run, "--training.steps=8", "--dataset.size=130", *MORE)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--evaluation.inception_weights=nowhere.pth", '--evaluation.metrics=["fid"]'], r"nowhere.pth.* do not exist"),
        (["--evaluation.images=90"], r"90 images of the samples are too few for 96 features"),
        (["--evaluation.reference_images=90"], r"90 images of the reference are too few for 96"),
        (["--evaluation.reference=nowhere.npz"], r"nowhere.npz"),
        (["--evaluation.encoders=[]"], r"evaluation.metrics, evaluation.encoders and .* are empty"),
        (["--recipe.name=tokenizer"], r"recipe 'tokenizer' has no denoiser"),
        (['--evaluation.reconstruction=["rfd"]', "--evaluation.encoders=[]"], r'has "rfd", but evaluation.encoders is'),
        (
            ['--evaluation.reconstruction=["rfd"]', "--evaluation.reconstruction_images=90"],
            r"90 images .* too few for 96",
        ),
        (["--evaluation.heldout.split=validation"], r"evaluation.heldout.split = 'validation': not allowed"),
        (['--evaluation.metrics=["fidd"]'], r"evaluation.metrics.0 = 'fidd': not allowed; did you mean 'fid'"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(0, 1, tmp_path / "run", *options)
    assert not list(tmp_path.glob("run/checkpoints/*"))
