"""Weight files: every layout is recognized, no code in a file is executed, and mismatches are named."""

import argparse
import json
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from components.files import weights_file
from components.files.diffusers_folder import write_folder
from components.files.model_file import read_part, save_tree, write_model, write_part
from components.files.weights import WeightsError, read_state, read_tree
from components.nn.latent_norm import LatentNorm
from components.version import version
from plugins.losses.patchgan import PatchGAN
from plugins.tokenizers.autoencoder_kl import AutoencoderKL, diffusers_format
from tests.support import toys
from trainer import config as configs

OPTIONS = {"channels": 8, "multipliers": [1, 2, 2], "attention_levels": [2], "norm_groups": 4, "res_blocks": 1}


@pytest.fixture
def trained() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(**OPTIONS)


@pytest.fixture
def gan() -> PatchGAN:
    torch.manual_seed(2)
    return PatchGAN(channels=8, layers=2)


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def assert_loads(path, trained: AutoencoderKL, **options) -> None:
    torch.manual_seed(9)
    loaded = AutoencoderKL(**OPTIONS | options, checkpoint=str(path))
    loaded.load_weights()
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in loaded.state_dict().items())


def published(trained: AutoencoderKL, gan: PatchGAN) -> dict:
    """A training checkpoint as the published code saves it."""
    sit = {"pos_embed": torch.zeros(1, 4, 8), "bn.running_mean": torch.zeros(4)}
    return {
        "model": sit,
        "ema": sit,
        "vae": trained.state_dict(),
        "discriminator": gan.network.state_dict(),
        "opt": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(vae="f8d4", cfg_prob=0.1, exp_name=None),
        "steps": 7,
    }


def compvis(trained: AutoencoderKL, gan: PatchGAN) -> dict:
    """An autoencoder's checkpoint as Lightning saves it."""
    loss = {"logvar": torch.zeros(()), "perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    loss |= prefixed("discriminator.", gan.network.state_dict())
    extra = {
        "model_ema.decay": torch.zeros(()),
        "linear_proj.weight": torch.zeros(2),
        "foundation_model.x": loss["logvar"],
    }
    return {"epoch": 3, "global_step": 9, "state_dict": trained.state_dict() | prefixed("loss.", loss) | extra}


def test_tokenizer_from_every_layout(trained, gan, tmp_path):
    state = trained.state_dict()
    torch.save(state, tmp_path / "bare.pt")
    torch.save(published(trained, gan), tmp_path / "0000007.pt")
    torch.save(compvis(trained, gan), tmp_path / "last.ckpt")
    stable = prefixed("first_stage_model.", state) | {"model.diffusion_model.out.weight": torch.zeros(1)}
    torch.save({"state_dict": stable, "global_step": 1}, tmp_path / "sd.ckpt")
    save_file(stable, tmp_path / "sd.safetensors")
    torch.save(prefixed("module.", state), tmp_path / "ddp.pt")
    torch.save({"model": prefixed("_orig_mod.", state)}, tmp_path / "compiled.bin")
    save_file(diffusers_format.to_diffusers(state), tmp_path / "diffusion_pytorch_model.safetensors")
    write_part(tmp_path / "tokenizer.safetensors", "tokenizer", state, "", 1, "ema")
    write_model(tmp_path / "model", {"tokenizer": state}, "", 1, "ema")
    found = sorted(path for path in tmp_path.iterdir())
    assert len(found) == 10
    for path in found:
        assert_loads(path, trained)


def diffusers_folder(folder: Path, trained: AutoencoderKL) -> Path:
    architecture = trained.architecture
    about = diffusers_format.config(architecture, 32, None, None)
    write_folder(folder, diffusers_format.to_diffusers(trained.state_dict()), about)
    return folder


def test_tokenizer_from_diffusers_folders(trained, tmp_path):
    whole = diffusers_folder(tmp_path / "whole", trained)
    assert_loads(whole, trained)

    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text((whole / "config.json").read_text())
    state = diffusers_format.to_diffusers(trained.state_dict())
    index = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(index.values()):
        save_file({key: state[key].contiguous() for key in state if index[key] == name}, shards / name)
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_loads(shards, trained)

    # Options that no shape reveals are checked, too.
    with pytest.raises(WeightsError, match="norm_groups = 4"):
        assert_loads(whole, trained, norm_groups=2)
    with pytest.raises(WeightsError, match=r"attention_levels = \[2\]\n  mid_attention = true"):
        assert_loads(whole, trained, attention_levels=[], mid_attention=False)
    (whole / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"contains none of diffusion_pytorch_model.safetensors"):
        assert_loads(whole, trained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"neither tokenizer.safetensors .* nor config.json"):
        assert_loads(tmp_path / "empty", trained)


def test_discriminator_from_every_layout(trained, gan, tmp_path):
    torch.save(gan.network.state_dict(), tmp_path / "vae-discriminator-ckpt.pt")
    torch.save(published(trained, gan), tmp_path / "0000007.pt")
    torch.save(compvis(trained, gan), tmp_path / "last.ckpt")
    write_model(tmp_path / "model", {"discriminator": gan.state_dict()}, "", 1, "ema")
    for name in ("vae-discriminator-ckpt.pt", "0000007.pt", "last.ckpt", "model", "model/discriminator.safetensors"):
        loaded = PatchGAN(channels=8, layers=2, checkpoint=str(tmp_path / name))
        loaded.load_weights()
        for key, value in loaded.network.state_dict().items():
            assert torch.equal(value, gan.network.state_dict()[key]), f"{name}: {key}"


def test_what_is_left_out_is_named(trained, gan, tmp_path, caplog):
    torch.save(compvis(trained, gan), tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, logger="titanrepa"):
        assert_loads(tmp_path / "last.ckpt", trained)
    count = len(gan.network.state_dict())
    assert f"state_dict.loss.discriminator.* ({count} tensors)" in caplog.text
    for name in ("loss.logvar", "loss.perceptual_loss", "model_ema", "linear_proj", "foundation_model"):
        assert f"state_dict.{name}" in caplog.text, name
    # Any other unknown key is an error.
    state = trained.state_dict() | {"encoder.new.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "strange.ckpt")
    with pytest.raises(WeightsError, match=r"1 unexpected: encoder.new.weight"):
        assert_loads(tmp_path / "strange.ckpt", trained)


def test_every_misfit_is_named(trained, tmp_path):
    state = trained.state_dict()
    removed = [key for key in state if ".norm1." in key]
    for key in removed:
        del state[key]
    state["quant_conv.weight"] = torch.zeros(2, 2, 1, 1)
    state["quant_conv.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(WeightsError) as error:
        assert_loads(tmp_path / "x.pt", trained)
    text = str(error.value)
    assert f"{len(removed)} missing" in text and "1 unexpected: quant_conv.extra" in text
    assert "1 with a different shape: quant_conv.weight: file (2, 2, 1, 1), expected (8, 8, 1, 1)" in text


class Malicious:
    """Unpickling it would create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["top", "args"])
def test_code_in_a_file_is_refused(trained, tmp_path, where, zipped):
    harm = Malicious(tmp_path / "owned")
    tree = {"vae": trained.state_dict(), "x": harm if where == "top" else argparse.Namespace(x=harm)}
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as error:
        read_tree(tmp_path / "x.pt", "tokenizer")
    text = str(error.value)
    assert "x.pt' is refused: it pickles posix.mkdir" in text and "could run code" in text
    assert not (tmp_path / "owned").exists()
    torch.save(tree, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)  # shows that the file would have done it
    assert (tmp_path / "owned").exists()


def test_what_is_allowed_does_not_leak(tmp_path):
    torch.save({"a": torch.zeros(1), "args": argparse.Namespace(x=1)}, tmp_path / "x.pt")
    assert read_tree(tmp_path / "x.pt", "tokenizer")["args"].x == 1
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "x.pt", weights_only=True)


def test_lightning_leftovers_are_read_as_nothing(trained, gan, tmp_path, monkeypatch):
    """CompVis checkpoints contain Lightning's classes and NumPy scalars; none is loaded."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
    tree = compvis(trained, gan) | {"callbacks": {callback: {"best_model_score": np.float64(0.5)}}}
    torch.save(tree, tmp_path / "last.ckpt")
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, module)
    assert_loads(tmp_path / "last.ckpt", trained)
    assert weights_file.read(tmp_path / "last.ckpt", "x").values["epoch"] == 3


def test_damaged_and_absent_files(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"nothing")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    for name, words in (
        ("x.pt", "cannot be read"),
        ("x.safetensors", "cannot be read"),
        ("list.pt", "contains a list"),
        ("none.pt", "no named tensors"),
        ("nowhere.pt", "does not exist"),
        (".", "is a folder"),
    ):
        with pytest.raises(WeightsError, match=words) as error:
            read_state(tmp_path / name, "[tokenizer] x")
        assert "[tokenizer] x" in str(error.value)


def test_hub_paths(trained, tmp_path, monkeypatch):
    """hf://organization/name/file[@revision] downloads that file of that revision, including from subfolders."""
    asked = []
    torch.save(trained.state_dict(), tmp_path / "vae.pt")

    def download(repo_id, filename, revision, local_files_only=False):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "vae.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_loads("hf://REPA-E/e2e-vavae/e2e-vavae-400k.pt", trained)
    assert_loads("hf://REPA-E/sit/checkpoints/0400000.pt@v1.0", trained)
    assert asked == [
        ("REPA-E/e2e-vavae", "e2e-vavae-400k.pt", None),
        ("REPA-E/sit", "checkpoints/0400000.pt", "v1.0"),
    ]
    for wrong in ("hf://REPA-E", "hf://REPA-E/sit", "hf://REPA-E/sit/", "hf://a/b/c@"):
        with pytest.raises(WeightsError, match=r"hf://organization/name/file\[@revision\]"):
            assert_loads(wrong, trained)


def test_hub_path_without_network_says_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        read_state("hf://REPA-E/e2e-vavae/e2e-vavae-400k.pt@main", "[tokenizer] autoencoder_kl")
    text = str(error.value)
    assert "[tokenizer] autoencoder_kl" in text and "REPA-E/e2e-vavae" in text
    assert "HF_HOME" in text and "replace 'hf://REPA-E/e2e-vavae/e2e-vavae-400k.pt@main'" in text


def test_hub_paths_pass_the_config_untouched(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    path = "hf://REPA-E/e2e-vavae/e2e-vavae-400k.pt@main"
    config = configs.load(str(tmp_path / "toy.toml"), [f"--tokenizer.checkpoint={path}"])
    assert config.tokenizer.options["checkpoint"] == path


def test_model_folder(trained, tmp_path):
    norm = LatentNorm(4)
    norm.set_statistics(torch.arange(4.0), torch.arange(4.0) + 1)
    trained = trained.to(memory_format=torch.channels_last)
    states = {
        "tokenizer": trained.state_dict(),
        "latent_norm": norm.state_dict(),
        "heads": {"a": torch.ones(3).bfloat16()},
    }
    folder = tmp_path / "model"
    written = write_model(folder, states, "[run]\n", 12, "ema")
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in written)
    assert (folder / "config.toml").read_text() == "[run]\n"
    for part, state in states.items():
        read, about = read_part(folder / f"{part}.safetensors")
        assert about.pop("titanrepa_version") == version()
        assert about == {"format": "titanrepa-1", "part": part, "config": "[run]\n", "step": "12", "weights": "ema"}
        assert read.keys() == state.keys()
        assert all(read[k].dtype == state[k].dtype and torch.equal(read[k], state[k]) for k in state)
    # Another model written here leaves no file of the previous one.
    write_model(folder, {"tokenizer": trained.state_dict()}, "[run]\n", 13, "online")
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "tokenizer.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="titanrepa-1"):
        read_part(tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="damaged"):
        read_part(tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        read_part(tmp_path / "none.safetensors")


def test_a_kill_while_writing_leaves_no_model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_model(folder, {"tokenizer": {"a": torch.zeros(2)}, "denoiser": {"b": torch.zeros(2)}}, "", 1, "ema")
    before = (folder / "tokenizer.safetensors").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_model(folder, {"tokenizer": {"a": torch.ones(2)}}, "", 2, "ema")
    assert not (folder / "config.toml").exists()
    assert (folder / "tokenizer.safetensors").read_bytes() == before


def test_saved_views_do_not_carry_their_memory(tmp_path):
    whole = torch.arange(1_000_000.0)
    tree = {"a": whole[:2], "again": whole[:2], "tied": whole[2:4].clone()}
    tree["and"] = tree["tied"]
    save_tree(tmp_path / "x.pt", tree | {"b": {"steps": 3}})
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    assert read_tree(tmp_path / "x.pt", "x")["b"] == {"steps": 3}
    write_part(tmp_path / "x.safetensors", "x", tree, "", 1, "ema")
    for read in (read_tree(tmp_path / "x.pt", "x"), read_part(tmp_path / "x.safetensors")[0]):
        assert all(torch.equal(read[key], tree[key]) for key in tree)
