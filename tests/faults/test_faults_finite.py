"""Values that are not finite are refused where they leave the program, with a count and a place; no file is written."""

from __future__ import annotations

import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from components.contracts import Posterior
from components.data.pixels import bounded, to_uint8
from components.distributed.parallel import World
from components.evaluation import EvaluationError
from components.evaluation.statistics import NetworkMetrics, StatisticsBuilder
from components.files.model_file import write_model
from components.finite import NotFiniteError, check_weights, count_of, faulty_rows
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from tests.support import toys
from trainer import config as configs
from trainer.__main__ import main
from trainer.evaluation import tokenizer_quality
from trainer.evaluation.references import read_statistics
from trainer.models.source import open_source
from trainer.run.loop import Trainer

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
def test_rows_are_counted_and_placed(value):
    x = torch.zeros(4, 3, 2, 2)
    x[1, 2, 1, 1] = x[3, 0, 0, 0] = value
    assert faulty_rows(x) == [1, 3] and faulty_rows(x, 16) == [17, 19] and faulty_rows(torch.zeros(2)) == []
    assert count_of([19, 17], 64, "samples") == "2 of 64 samples are not finite (first: number 17)"
    assert faulty_rows(bounded(x)) == [1, 3] and not bounded(x)[[0, 2]].any()  # clamping must not hide infinity
    with pytest.raises(NotFiniteError, match=r"2 of 4 images of a batch are not finite \(first: number 1\)"):
        to_uint8(x)


def test_bounded_clamps_bit_for_bit():
    x = torch.randn(8, 3, 4, 4) * 2
    assert torch.equal(bounded(x), x.clamp(-1, 1))


@pytest.mark.parametrize("value", BAD)
def test_a_model_folder_is_not_written(tmp_path, value):
    sound = {"weight": torch.zeros(3), "steps": torch.tensor(1)}
    write_model(tmp_path, {"denoiser": sound}, "", 1, "ema")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = sound | {"weight": torch.tensor([0.0, value, 0.0])}
    message = r"1 of 2 tensors of the denoiser are not finite \(first: weight, 1 of 3 values\); nothing was written"
    with pytest.raises(NotFiniteError, match=message):
        write_model(tmp_path, {"tokenizer": sound, "denoiser": broken}, "", 2, "ema")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(NotFiniteError):
        write_model(tmp_path / "new", {"denoiser": broken}, "", 2, "ema")
    assert not (tmp_path / "new").exists()
    check_weights({"denoiser": sound}, "")


class Features(nn.Module):
    dims = {"embedding": 4}
    about = {"name": "features"}


@pytest.mark.parametrize("metrics", [("fd",), ("precision",)])
def test_features_are_refused_with_their_image(metrics):
    network = Features()
    builder = StatisticsBuilder(NetworkMetrics("x", network, metrics), World(), generated=True)
    features = {"embedding": torch.randn(4, 4), "pool": torch.randn(4, 4)}
    builder.add(features)
    features = {name: values.clone() for name, values in features.items()}
    for values in features.values():
        values[2, 1] = math.nan
    with pytest.raises(EvaluationError, match=r"1 of 4 images of a batch are not finite \(first: number 6\), counted"):
        builder.add(features)


def test_a_statistics_file_is_refused(tmp_path):
    sigma = np.eye(4)
    sigma[1, 2] = np.nan
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=sigma)
    with pytest.raises(EvaluationError, match=r"1 of 4 rows of sigma are not finite \(first: number 1\); compute"):
        read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.array([0, np.inf]), sigma=np.eye(2))
    with pytest.raises(EvaluationError, match="1 of 2 rows of mu are not finite"):
        read_statistics(tmp_path / "b.npz")


def test_a_reconstruction_is_not_measured():
    tokenizer = toys.modules(dtype=torch.float32).tokenizer.eval()
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).view(-1)[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"2 of 2 images of a batch are not finite"):
        tokenizer_quality.reconstruct(tokenizer, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


# Whole commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps; read-only."""
    folder = tmp_path_factory.mktemp("finite")
    toml = folder / "toy.toml"
    toml.write_text(toys.TOML)
    Trainer(configs.load(str(toml), ["--training.steps=2", f"--run.dir={folder}/run"]), World()).run()
    return folder / "run"


def poisoned(monkeypatch, name: str, change) -> None:
    """Change a module of every source that is opened."""
    from trainer.models import source

    def opened(*args, **kwargs):
        found = open_source(*args, **kwargs)
        with torch.no_grad():
            change(found.parts.modules.named()[name])
        return found

    monkeypatch.setattr(source, "open_source", opened)


def first_weight(value: float):
    return lambda module: next(module.parameters()).view(-1)[:1].fill_(value)


def every_weight(value: float):
    return lambda module: [parameter.fill_(value) for parameter in module.parameters()]


@pytest.mark.long
@pytest.mark.parametrize("name, value", [("denoiser", math.nan), ("tokenizer", math.nan), ("latent_norm", math.inf)])
def test_sample_refuses_and_names_the_weights(run, tmp_path, monkeypatch, capsys, name, value):
    change = (lambda norm: norm.running_var.fill_(value)) if name == "latent_norm" else every_weight(value)
    poisoned(monkeypatch, name, change)
    out = tmp_path / "out"
    assert main(["sample", str(run), "--num-samples=6", "--batch-size=2", f"--out={out}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 2 of 6 samples are not finite (first: number 0), and none of these was written; ")
    assert "; 4 were not sampled, after a batch without a finite image; " in error
    assert f"tensors of the {name} are not finite (first: " in error and "Choose another checkpoint" in error
    assert [path.name for path in out.iterdir()] == ["samples.json"]


@pytest.mark.long
def test_sample_keeps_the_sound_images_and_ends_without_archive(run, tmp_path, monkeypatch, capsys):
    """One class has a broken embedding."""
    poisoned(monkeypatch, "denoiser", lambda d: d.y_embedder.embedding_table.weight[3].fill_(math.nan))
    out = tmp_path / "out"
    words = [str(run), "--num-samples=20", "--batch-size=4", f"--out={out}"]
    assert main(["sample", *words]) == 2
    assert "2 of 20 samples are not finite (first: number 3)" in capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert names == {"samples.json", *(f"{i:06d}.png" for i in range(20) if i not in (3, 13))}
    assert main(["evaluate", str(out), "--reference=dataset", "--encoder=tiny_vit"]) == 2
    assert "holds 18 of 20 images" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["sample", *words]) == 2  # the folder belongs to other weights
    shutil.rmtree(out)
    assert main(["sample", *words]) == 0


@pytest.mark.long
def test_training_goes_on_without_pictures_and_metrics(tmp_path, caplog):
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    options = [
        "--training.steps=2", "--sampling.every=1", f"--run.dir={tmp_path}/run", "--evaluation.every=1",
        "--evaluation.metrics=[]", '--evaluation.encoders=["tiny_vit"]', "--evaluation.images=8",
        "--evaluation.batch_size=4", "--evaluation.allow_singular=true", "--evaluation.reference_images=20",
    ]  # fmt: skip
    trainer = Trainer(configs.load(str(toml), options), World())
    load = trainer.train_step.ema.update

    def update(finite):
        load(finite)
        first_weight(math.nan)(trainer.ema.modules["denoiser"])

    trainer.train_step.ema.update = update
    with caplog.at_level(logging.INFO):
        assert trainer.run()
    assert "step 1: no picture, as 10 of 10 samples are not finite (first: number 0)" in caplog.text
    assert "step 2: no evaluation, as 4 of 4 samples are not finite (first: number 0)" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir()) == [
        "reconstructions_00000001.png", "reconstructions_00000002.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [name for line in lines for name in line if name.startswith("evaluation/")]


@pytest.mark.long
@pytest.mark.parametrize("form", ["safetensors", "diffusers", "repae"])
def test_export_writes_nothing(run, tmp_path, monkeypatch, capsys, form):
    from trainer.models import source

    def read(*args, **kwargs):
        found = source_read(*args, **kwargs)
        for state in found.states.values():
            next(iter(state.values())).view(-1)[:1].fill_(math.nan)
        return found

    source_read = source.read_source
    monkeypatch.setattr(source, "read_source", read)
    assert main(["export", str(run), f"--format={form}", f"--out={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert "of the tokenizer are not finite (first: " in error and "nothing was written" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_import_writes_nothing(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "export"
    assert main(["export", str(run), "--format=repae", "--name=x", f"--out={out}"]) == 0
    file = torch.load(out / "x.pt", weights_only=True)
    next(iter(file["ema"].values())).view(-1)[0] = math.inf
    torch.save(file, out / "x.pt")
    words = ["import", str(out / "x.pt"), f"--config={run}/config.toml", f"--out={tmp_path}/model"]
    assert main(words) == 2
    assert "of the denoiser are not finite" in capsys.readouterr().err and not (tmp_path / "model").exists()


@pytest.mark.long
def test_encode_names_the_images(run, tmp_path, monkeypatch, capsys):
    encode, calls = AutoencoderKL.encode, []

    def broken(self, x):
        found = encode(self, x)
        calls.append(len(x))
        if len(calls) == 2:
            found = Posterior(found.mean.index_fill(0, torch.tensor([2]), math.nan), found.logvar)
        return found

    monkeypatch.setattr(AutoencoderKL, "encode", broken)
    assert main(["encode", str(run), f"--out={tmp_path}/cache", "--batch-size=8", "--shard-size=16"]) == 2
    error = capsys.readouterr().err
    assert "images 8 to 15: 'mean' is not finite" in error and "(1 of 8 images of the batch are not finite" in error
    assert not (tmp_path / "cache" / "index.json").exists()
