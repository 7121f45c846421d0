"""What only a GPU can show. Skipped without one."""

import json

import pytest
import torch

from components.parallel import World
from tests import toys
from trainer import config
from trainer.loop import Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def losses(folder) -> list[float]:
    return [json.loads(line)["denoiser/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(tmp_path, name: str, *overrides: str) -> list[float]:
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    loaded = config.load(str(toml), [f"--run.dir={tmp_path / name}", "--loader.workers=2", *overrides])
    Trainer(loaded, World(device=torch.device("cuda", 0))).run()
    return losses(tmp_path / name)


def test_gpu_equals_cpu_in_fp64(tmp_path):
    gpu = train(tmp_path, "gpu", "--training.precision=fp64")
    loaded = config.load(str(tmp_path / "toy.toml"), [f"--run.dir={tmp_path / 'cpu'}", "--training.precision=fp64"])
    Trainer(loaded, World()).run()
    assert gpu == pytest.approx(losses(tmp_path / "cpu"), rel=1e-5)


def test_bf16_compiled_trains_and_resumes(tmp_path):
    options = ["--training.precision=bf16", "--training.compile"]
    eager = train(tmp_path, "eager", "--training.precision=bf16")
    train(tmp_path, "parts", *options, "--training.steps=3")
    compiled = train(tmp_path, "parts", *options)
    assert compiled == pytest.approx(eager, rel=0.05)
