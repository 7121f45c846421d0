"""The import command converts published checkpoints to model folders, and export restores them unchanged."""

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.distributed.parallel import World
from components.files.diffusers_folder import write_folder
from components.files.weights import read_tree
from plugins.tokenizers.autoencoder_kl import diffusers_format
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.models.source import open_source
from trainer.run.construct import construct_parts, make_plugin

pytestmark = pytest.mark.long

CLASSES = 7  # not the dataset's ten: the file's number is used


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("import") / "toy.toml"
    path.write_text(toys.TOML)
    return path


@pytest.fixture(scope="module")
def published(toml) -> dict:
    """A training checkpoint of random numbers under the published names."""
    with torch.device("meta"):
        loaded = config.load(str(toml), [f"--training.num_classes={CLASSES + 3}"])
        m = construct_parts(loaded, on_meta=True).modules
    generator = torch.Generator().manual_seed(0)

    def random(module, prefix: str = "") -> dict[str, Tensor]:
        found = {}
        for key, value in module.state_dict().items():
            whole = torch.full(value.shape, 3) if value.dtype == torch.int64 else None
            found[prefix + key] = torch.rand(value.shape, generator=generator) + 0.5 if whole is None else whole
        return found

    def sit() -> dict[str, Tensor]:
        state = random(m.denoiser) | random(m.heads, "projectors.") | random(m.latent_norm, "bn.")
        state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][: CLASSES + 1].clone()
        return state

    return {
        "model": sit(),
        "ema": sit(),
        "vae": random(m.tokenizer),
        "discriminator": random(m.discriminator.network),
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "args": argparse.Namespace(resolution=32, encoder_depth=1, path_type="linear", qk_norm=False, cfg_prob=0.1),
        "steps": 400_000,
    }


@pytest.fixture
def file(published, tmp_path) -> Path:
    torch.save(published, tmp_path / "0400000.pt")
    return tmp_path / "0400000.pt"


def import_(*words) -> int:
    return main(["import", *map(str, words)])


def refused(capsys, *words) -> str:
    assert import_(*words) == 2
    return capsys.readouterr().err


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_there_and_back_again(file, published, toml, tmp_path, capsys):
    out = tmp_path / "model"
    assert import_(file, "--config", toml, "--out", out) == 0
    said = capsys.readouterr().out
    assert "step 400000, ema weights" in said and "opt.* (1 tensors)" in said and "Warning" not in said
    assert main(["export", str(out), "--format=repae", f"--out={tmp_path}/back"]) == 0
    assert "equal" not in capsys.readouterr().out
    back = read_tree(tmp_path / "back" / "0400000.pt", "x")
    assert back["steps"] == 400_000
    for name in ("model", "ema", "vae", "discriminator"):
        assert equal(back[name], published[name]), name
    stats = read_tree(tmp_path / "back" / "0400000-latents-stats.pt", "x")
    assert torch.equal(stats["latents_scale"].flatten(), published["ema"]["bn.running_var"].rsqrt())


def test_the_model_folder_is_the_checkpoint(file, published, toml, tmp_path):
    for weights in ("ema", "model"):
        out = tmp_path / weights
        assert import_(file, "--config", toml, f"--weights={weights}", "--out", out) == 0
        source = open_source(str(out), World())
        m = source.parts.modules
        assert source.step == 400_000 and source.parts.num_classes == CLASSES == source.config.training.num_classes
        assert source.weights == {"ema": "ema", "model": "online"}[weights]
        bare = {k: v for k, v in published[weights].items() if not k.startswith(("bn.", "projectors."))}
        assert equal(m.denoiser.state_dict(), bare)
        assert torch.equal(m.latent_norm.running_var, published[weights]["bn.running_var"])
        assert equal(m.tokenizer.state_dict(), published["vae"])
    assert (tmp_path / "ema" / "online" / "denoiser.safetensors").is_file()
    assert not (tmp_path / "model" / "online").exists()


def test_every_misfit_of_every_part_is_named(published, toml, tmp_path, capsys):
    ema, vae = dict(published["ema"]), dict(published["vae"])
    del ema["blocks.1.attn.qkv.bias"], ema["bn.running_var"], ema["projectors.0.4.bias"]
    ema["t_embedder.mlp.0.weight"] = torch.zeros(2, 2)
    vae["encoder.strange"] = torch.zeros(1)
    torch.save(published | {"ema": ema, "vae": vae}, tmp_path / "x.pt")
    said = refused(capsys, tmp_path / "x.pt", "--config", toml, "--out", tmp_path / "model")
    for words in (
        "denoiser: '",
        "1 missing: blocks.1.attn.qkv.bias",
        "1 with a different shape: t_embedder.mlp.0.weight: file (2, 2), expected (32, 256)",
        "1 missing: running_var",
        "1 missing: 0.4.bias",
        "1 unexpected: encoder.strange",
    ):
        assert words in said, words
    assert not (tmp_path / "model").exists()


def test_tokenizer_and_denoiser_of_their_own(published, toml, tmp_path, capsys):
    """The second stage's checkpoint has no tokenizer."""
    torch.save({k: published[k] for k in ("model", "ema", "opt", "args")}, tmp_path / "ldm.pt")
    torch.save(published["vae"], tmp_path / "vae.pt")
    words = [tmp_path / "ldm.pt", "--config", toml, "--out", tmp_path / "model"]
    assert "--tokenizer=FILE" in refused(capsys, *words)
    assert import_(*words, "--tokenizer", tmp_path / "vae.pt") == 0
    m = open_source(str(tmp_path / "model"), World()).parts.modules
    assert equal(m.tokenizer.state_dict(), published["vae"])
    assert torch.equal(m.latent_norm.running_mean, published["ema"]["bn.running_mean"])
    # The config's own tokenizer works, too.
    assert import_(*words, f"--tokenizer.checkpoint={tmp_path}/vae.pt") == 0


def test_statistics_from_a_file(published, toml, tmp_path, capsys):
    bare = {k: v for k, v in published["ema"].items() if not k.startswith(("bn.", "projectors."))}
    torch.save({"ema": bare, "vae": published["vae"]}, tmp_path / "x.pt")
    words = [tmp_path / "x.pt", "--config", toml, "--out", tmp_path / "model"]
    assert "add --stats=FILE" in refused(capsys, *words)
    stats = {"latents_scale": torch.full((1, 4, 1, 1), 0.5), "latents_bias": torch.full((1, 4, 1, 1), 3.0)}
    torch.save(stats, tmp_path / "x-latents-stats.pt")
    assert import_(*words, "--stats", tmp_path / "x-latents-stats.pt") == 0
    assert "has no alignment heads; only training needs them" in capsys.readouterr().out
    norm = open_source(str(tmp_path / "model"), World()).parts.modules.latent_norm
    assert norm.running_mean.tolist() == [3.0] * 4 and norm.running_var.tolist() == [4.0] * 4
    wrong = {key: value[:, :2] for key, value in stats.items()}
    torch.save(wrong, tmp_path / "wrong.pt")
    assert "expected 4 means" in refused(capsys, *words, "--stats", tmp_path / "wrong.pt")


def test_diffusers_folder(published, toml, tmp_path, capsys):
    with torch.device("meta"):
        tokenizer = make_plugin("tokenizer", "tokenizer", config.load(str(toml)).tokenizer)
    about = diffusers_format.config(tokenizer.architecture, 32, torch.arange(4.0), torch.arange(4.0) + 1)
    write_folder(tmp_path / "vae", diffusers_format.to_diffusers(published["vae"]), about)
    assert import_(tmp_path / "vae", "--config", toml, "--out", tmp_path / "model") == 0
    found = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert found == ["config.toml", "latent_norm.safetensors", "tokenizer.safetensors"]
    m = open_source(str(tmp_path / "model"), World(), needs=("tokenizer",)).parts.modules
    assert equal(m.tokenizer.state_dict(), published["vae"])
    assert "sample" not in capsys.readouterr().out
    # Next to a denoiser without statistics, the folder's own are used.
    torch.save({k: v for k, v in published["ema"].items() if not k.startswith("bn.")}, tmp_path / "sit.pt")
    words = ["--config", toml, "--tokenizer", tmp_path / "vae", "--out", tmp_path / "both"]
    assert import_(tmp_path / "sit.pt", *words) == 0
    norm = open_source(str(tmp_path / "both"), World()).parts.modules.latent_norm
    assert norm.running_mean.tolist() == [0.0, 1.0, 2.0, 3.0] and norm.running_var.tolist() == [1.0, 4.0, 9.0, 16.0]
    said = refused(capsys, tmp_path / "vae", "--config", toml, "--out", tmp_path / "x", "--tokenizer.norm_groups=2")
    assert "norm_groups = 4" in said


def test_what_shapes_do_not_show_is_told(published, toml, tmp_path, capsys):
    args = argparse.Namespace(encoder_depth=8, path_type="cosine", resolution=32, qk_norm=False, cfg_prob=0.1)
    torch.save(published | {"args": args}, tmp_path / "x.pt")
    assert import_(tmp_path / "x.pt", "--config", toml, "--out", tmp_path / "model") == 0
    said = capsys.readouterr().out
    assert "path_type = cosine, but the config has flow.path = linear" in said
    assert "encoder_depth = 8, but the config has denoiser.align_depth = 1" in said
    assert said.count("Warning") == 2


def test_a_file_of_something_else(toml, published, tmp_path, capsys):
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, tmp_path / "x.pt")
    said = refused(capsys, tmp_path / "x.pt", "--config", toml, "--out", tmp_path / "model")
    assert "holds no tensors of this config's tokenizer or denoiser" in said and "state_dict.layer" in said
    torch.save({"model": published["model"], "vae": published["vae"]}, tmp_path / "raw.pt")
    assert import_(tmp_path / "raw.pt", "--config", toml, "--out", tmp_path / "model") == 0
    assert "no averaged weights" in capsys.readouterr().out
    assert open_source(str(tmp_path / "model"), World()).weights == "online"
