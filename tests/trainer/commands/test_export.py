"""The export command: other programs read its files and get this model."""

import json
from pathlib import Path

import pytest
import torch

from components.distributed.parallel import World
from components.files.weights import read_tree
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.models.source import open_source, read_source
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

PARTS = ("tokenizer", "denoiser", "latent_norm", "heads", "discriminator")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps whose averages, including the tokenizer's, differ from its raw weights."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "toy.toml").write_text(toys.TOML)
    options = ["--training.steps=2", "--run.checkpoint_every=1", f"--run.dir={folder}/run"]
    averages = ["--ema.decay=0.5", "--ema.tokenizer=true"]
    Trainer(config.load(str(folder / "toy.toml"), [*options, *averages]), World()).run()
    return folder / "run"


def export(*words) -> int:
    return main(["export", *map(str, words)])


def refused(capsys, *words) -> str:
    assert export(*words) == 2
    return capsys.readouterr().err


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_diffusers_loads_the_tuned_tokenizer(run, capsys):
    diffusers = pytest.importorskip("diffusers")
    assert export(run, "--format=diffusers") == 0
    folder = run / "export" / "diffusers"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    said = capsys.readouterr().out
    assert f'from_pretrained("{folder}")' in said and "at step 2" in said and "config.json" in said

    source = open_source(str(run), World())
    ours, norm = source.parts.modules.tokenizer, source.parts.modules.latent_norm
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    assert theirs.config.latents_mean == pytest.approx(norm.running_mean.tolist())
    assert theirs.config.latents_std == pytest.approx(norm.running_var.sqrt().tolist())
    assert theirs.config.sample_size == 32
    x = source.config.training.resolution
    x = torch.rand(2, 3, x, x, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).sample, ours.decode(ours.encode(x).mean), rtol=0, atol=1e-5)


def test_diffusers_of_a_step_and_of_raw_weights(run, tmp_path):
    assert export(run, "--format=diffusers", "--step=1", "--weights=online", f"--out={tmp_path}/a") == 0
    assert export(run / "checkpoints/step_00000002", "--format=diffusers", f"--out={tmp_path}/b") == 0
    for name, step, weights in (("a", 1, "online"), ("b", 2, "ema")):
        states = read_source(str(run), step=step, weights=weights).states
        stated = json.loads((tmp_path / name / "config.json").read_text())
        assert stated["latents_mean"] == pytest.approx(states["latent_norm"]["running_mean"].tolist())
        kept = read_tree(tmp_path / name / "diffusion_pytorch_model.safetensors", "x")
        assert torch.equal(kept["encoder.conv_in.weight"], states["tokenizer"]["encoder.conv_in.weight"])


def test_a_format_that_no_plugin_declares_is_refused(run, tmp_path, capsys, monkeypatch):
    from plugins.tokenizers.autoencoder_kl import AutoencoderKL

    said = refused(capsys, run, "--format=difusers", f"--out={tmp_path}/x")
    assert "--format=diffusers: the tokenizer" in said and "--format=repae: a training checkpoint" in said
    monkeypatch.setattr(AutoencoderKL, "adapters", ())
    said = refused(capsys, run, "--format=diffusers", f"--out={tmp_path}/x")
    assert "tokenizer.name = 'autoencoder_kl'" in said and "--format=safetensors: a model folder" in said
    assert "--format=diffusers:" in said.split(chr(10))[0] and not (tmp_path / "x").exists()


def test_a_config_is_a_source_of_its_own_tokenizer(run, tmp_path, capsys):
    """A published file becomes a diffusers folder without a run."""
    tokenizer = read_source(str(run)).states["tokenizer"]
    torch.save({"state_dict": tokenizer}, tmp_path / "sd.ckpt")
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    assert "tokenizer.checkpoint" in refused(capsys, toml, "--format=diffusers", f"--out={tmp_path}/x")
    words = [toml, "--format=diffusers", f"--tokenizer.checkpoint={tmp_path}/sd.ckpt"]
    assert "--out=FOLDER" in refused(capsys, *words)
    assert export(*words, f"--out={tmp_path}/x") == 0
    stated = json.loads((tmp_path / "x" / "config.json").read_text())
    assert stated["scaling_factor"] == 1.0 and "latents_mean" not in stated


def test_model_folder_is_the_same_model(run, tmp_path, capsys):
    assert export(run, "--format=safetensors", f"--out={tmp_path}/model") == 0
    assert f"sample|evaluate|encode {tmp_path}/model" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"config.toml", *(f"{part}.safetensors" for part in PARTS)}
    original = read_source(str(run), needs=PARTS)
    model = read_source(f"{tmp_path}/model", needs=PARTS)
    assert model.step == 2 and model.weights == "ema" and model.config == original.config
    assert all(equal(model.states[part], original.states[part]) for part in PARTS)
    assert not equal(model.states["denoiser"], read_source(str(run), weights="online").states["denoiser"])
    opened = open_source(f"{tmp_path}/model", World()).parts.modules
    assert equal(opened.denoiser.state_dict(), original.states["denoiser"])

    # One part is usable alone.
    again = config.load(
        f"{tmp_path}/model/config.toml", [f"--tokenizer.checkpoint={tmp_path}/model/tokenizer.safetensors"]
    )
    assert again.training.num_classes == 10
    assert export(run, "--format=safetensors", "--parts=denoiser, heads", f"--out={tmp_path}/two") == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "config.toml",
        "denoiser.safetensors",
        "heads.safetensors",
    }
    assert "unknown part 'vae'" in refused(capsys, run, "--format=safetensors", "--parts=vae")
    said = refused(capsys, tmp_path / "two", "--format=safetensors", "--parts=discriminator", f"--out={tmp_path}/x")
    assert "holds no discriminator" in said and not (tmp_path / "x").exists()


def test_published_checkpoint(run, tmp_path, capsys):
    assert export(run, "--format=repae", f"--out={tmp_path}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0000002.pt", "0000002-latents-stats.pt"}
    kept = read_tree(tmp_path / "0000002.pt", "x")
    assert kept.keys() == {"model", "ema", "vae", "discriminator", "steps"} and kept["steps"] == 2
    online = read_source(str(run), weights="online", needs=PARTS).states
    ema = read_source(str(run), weights="ema", needs=PARTS).states
    for name, states in (("model", online), ("ema", ema)):
        prefixes = {"denoiser": "", "heads": "projectors.", "latent_norm": "bn."}
        expected = {f"{prefix}{key}": v for part, prefix in prefixes.items() for key, v in states[part].items()}
        assert equal(kept[name], expected)
    assert not equal(kept["model"], kept["ema"])
    # As in sampling: the averaged tokenizer, if the run has one.
    assert equal(kept["vae"], ema["tokenizer"]) and not equal(kept["vae"], online["tokenizer"])
    network = {k.removeprefix("network."): v for k, v in online["discriminator"].items() if k.startswith("network.")}
    assert equal(kept["discriminator"], network) and "main.0.weight" in network

    stats = read_tree(tmp_path / "0000002-latents-stats.pt", "x")
    assert stats["latents_scale"].shape == stats["latents_bias"].shape == (1, 4, 1, 1)
    torch.testing.assert_close(stats["latents_scale"].flatten(), ema["latent_norm"]["running_var"].rsqrt())
    assert torch.equal(stats["latents_bias"].flatten(), ema["latent_norm"]["running_mean"])
    assert torch.load(tmp_path / "0000002.pt", weights_only=True).keys() == kept.keys()  # no class of this project
    assert export(run, "--format=repae", "--name=mine", f"--out={tmp_path}/b") == 0
    assert (tmp_path / "b" / "mine-latents-stats.pt").is_file()


def test_options_of_another_format_are_refused(run, capsys):
    assert "--parts applies only to --format=safetensors" in refused(capsys, run, "--format=repae", "--parts=denoiser")
    assert "--name applies only to training checkpoints" in refused(capsys, run, "--format=diffusers", "--name=x")
    assert "holds both" in refused(capsys, run, "--format=repae", "--weights=ema")
    assert "does not exist" in refused(capsys, run / "nowhere", "--format=repae")
    (run / "file").write_text("")
    assert f"--out = '{run}/file' cannot be written: '{run}/file' is a file" in refused(
        capsys, run, "--format=repae", f"--out={run}/file"
    )


def test_only_one_process_writes(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert export(run, "--format=repae", f"--out={tmp_path}/x") == 0
    assert not (tmp_path / "x").exists()
