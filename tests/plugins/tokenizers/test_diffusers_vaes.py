"""Autoencoders of SD 1, 2, XL, 3.5 and FLUX load from diffusers folders: network, preset and latent scale."""

import json

import pytest
import torch
from safetensors.torch import save_file

from components.files.weights import WeightsError
from components.nn.latent_norm import LatentNorm
from plugins.tokenizers.autoencoder_kl import AutoencoderKL, diffusers_format
from tests.support import toys
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.initial_statistics import read_statistics

diffusers = pytest.importorskip("diffusers")

# Settings of the published config.json files beyond the four levels of 128 to 512 channels that they share.
WITHOUT_QUANT_CONV = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
PUBLISHED = {
    "sd1": ("f8d4", {"scaling_factor": 0.18215}),
    "sd2": ("f8d4", {"scaling_factor": 0.18215, "sample_size": 768}),
    "sdxl": ("f8d4", {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}),
    "sd35": ("f8d16", WITHOUT_QUANT_CONV | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "flux": ("f8d16", WITHOUT_QUANT_CONV | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
}
TINY = {"channels": 8, "norm_groups": 4}


def made(name: str, base: int, groups: int):
    """diffusers' own module for a published config, with ``base`` channels at full resolution."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[base, 2 * base, 4 * base, 4 * base],
        layers_per_block=2,
        norm_num_groups=groups,
        **PUBLISHED[name][1],
    )


@pytest.fixture(params=PUBLISHED)
def folder(request, tmp_path):
    """The preset, diffusers' tiny module in fp64, and the folder it was saved to."""
    torch.manual_seed(0)
    theirs = made(request.param, 8, 4)
    theirs.save_pretrained(tmp_path / "vae")
    return PUBLISHED[request.param][0], theirs.double().eval(), tmp_path / "vae"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_preset_is_the_published_architecture(name):
    with torch.device("meta"):
        theirs, ours = made(name, 128, 32), AutoencoderKL(preset=PUBLISHED[name][0])
    named = dict(theirs.config) | {"_class_name": "AutoencoderKL"}
    assert diffusers_format.differences(ours.architecture, diffusers_format.architecture(named, "config.json")) == []
    shapes = {key: value.shape for key, value in diffusers_format.from_diffusers(theirs.state_dict()).items()}
    assert shapes == {key: value.shape for key, value in ours.state_dict().items()}


def test_encodes_and_decodes_as_diffusers_does(folder):
    preset, theirs, path = folder
    ours = AutoencoderKL(preset=preset, checkpoint=str(path), **TINY)
    ours.load_weights()
    ours.double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior, reference = ours.encode(x), theirs.encode(x).latent_dist
        assert torch.allclose(posterior.mean, reference.mean, rtol=1e-9, atol=1e-11)
        assert torch.allclose(posterior.std, reference.std, rtol=1e-9, atol=1e-11)
        assert torch.allclose(ours.decode(posterior.mean), theirs.decode(reference.mean).sample, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("named", ["", "config.json"])
def test_its_shift_and_scale_are_the_first_latent_statistics(folder, named):
    """(z - shift) * scale, as in diffusers' pipelines."""
    _, theirs, path = folder
    norm = LatentNorm(theirs.config.latent_channels, eps=0.0).double()
    norm.set_statistics(*(value.double() for value in read_statistics(str(path / named))))
    z = torch.randn(2, theirs.config.latent_channels, 4, 4, dtype=torch.float64)
    expected = (z - (theirs.config.shift_factor or 0.0)) * theirs.config.scaling_factor
    assert torch.allclose(norm(z), expected, rtol=1e-6, atol=1e-6)


def test_means_per_channel_go_before_one_factor_for_all(tmp_path):
    values = {"latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0], "scaling_factor": 0.5, "latent_channels": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    mean, std = read_statistics(str(tmp_path))
    assert mean.tolist() == [1.0, 2.0] and std.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "expected a diffusers folder"),
        ("{", "not the JSON of a diffusers autoencoder"),
        ("[1]", "not the JSON of a diffusers autoencoder"),
        ('{"scaling_factor": null}', "neither latents_mean"),
    ],
)
def test_a_folder_without_statistics_is_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says) as refusal:
        read_statistics(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


def test_another_architecture_names_the_options(folder):
    preset, _, path = folder
    other = {"f8d4": "f8d16", "f8d16": "f8d4"}[preset]
    with pytest.raises(WeightsError, match="quant_conv = ") as refusal:
        AutoencoderKL(preset=other, checkpoint=str(path), **TINY).load_weights()
    assert "latent_channels = " in str(refusal.value)


def test_a_run_names_one_folder_twice(tmp_path):
    """Weights and statistics come from a folder next to the config, given relative to it."""
    torch.manual_seed(0)
    made("flux", 8, 4).save_pretrained(tmp_path / "vae")
    lines = 'preset = "f8d16"\nchannels = 8\nnorm_groups = 4\ncheckpoint = "vae"\n\n[latent_norm]\nstatistics = "vae"\n'
    text = toys.TOML.replace("[latent_norm]\nimages = 16\n", "").replace("autoencoder_kl", "\0", 1)
    head, tail = text.split('name = "\0"\n')
    (tmp_path / "toy.toml").write_text(f'{head}name = "autoencoder_kl"\n{lines}\n{tail[tail.index("[denoiser]") :]}')
    loaded = config.load(str(tmp_path / "toy.toml"), ["--recipe.name=ldm"])
    assert loaded.latent_norm.statistics == str(tmp_path / "vae")
    assert assemble.check(loaded, 1).latent == (16, 4, 4)
    assert read_statistics(loaded.latent_norm.statistics)[1][0].item() == pytest.approx(1 / 0.3611)


def test_the_original_file_of_flux_is_read(tmp_path):
    """The keys are those of latent diffusion, without the convolutions around the latent."""
    saved = AutoencoderKL(preset="f8d16", **TINY)
    assert not any("quant" in key for key in saved.state_dict())
    save_file(saved.state_dict(), tmp_path / "ae.safetensors")
    loaded = AutoencoderKL(preset="f8d16", checkpoint=str(tmp_path / "ae.safetensors"), **TINY)
    loaded.load_weights()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), saved.state_dict().values()))
