"""The whole chain: train, encode, second stage, sample, evaluate, export, import, sample."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, str]:
    """Folder written by the script, and its output."""
    out = tmp_path_factory.mktemp("chain") / "chain"
    values = ["--training.steps=4", "--training.batch_size=16", "--sampling.images=10", "--sampling.steps=3"]
    done = subprocess.run(
        [ROOT / "train_configs" / "quickstart_chain.sh", out, *values, "--loader.workers=0"],
        capture_output=True, text=True, timeout=500, env=os.environ | {"IMAGES": "100"}, cwd=out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_the_re_imported_model_draws_identical_images(chain):
    out, said = chain
    first, again = (sorted((out / name).glob("0*.png")) for name in ("samples", "samples_again"))
    assert len(first) == len(again) == 100
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    assert len({p.read_bytes() for p in first}) == 100, "every image is another one"
    assert "identical" in said
    with np.load(out / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (100, 32, 32, 3)


def test_the_second_stage_learned_on_the_tuned_tokenizers_latents(chain):
    out, _ = chain
    index = json.loads((out / "latents" / "index.json").read_text())
    assert index["count"] == 2000
    lines = [json.loads(line) for line in (out / "second" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert 0 < lines[-1]["denoiser/velocity"] < 4


def test_the_numbers_lie_beside_the_images(chain):
    out, _ = chain
    samples = json.loads((out / "samples" / "evaluation.json").read_text())
    rebuilt = json.loads((out / "joint" / "reconstruction.json").read_text())
    text = json.dumps([samples, rebuilt])
    assert "fd_tiny_vit" in text
    assert "psnr" in text
    assert any((out / "second" / "tensorboard").rglob("*tfevents*"))
