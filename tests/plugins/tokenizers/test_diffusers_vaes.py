"""Autoencoders of SD 1, 2, XL, 3.5, FLUX and FLUX.2 load from diffusers folders: network, preset and latent scale."""

import json

import pytest
import torch
from safetensors.torch import save_file

from components.files.adapter import Exported
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


# -- FLUX.2 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flux2(tmp_path):
    """diffusers' tiny module in fp64 with made-up latent statistics, and the folder it was saved to."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLFlux2(
        block_out_channels=[8, 16, 32, 32], norm_num_groups=4, latent_channels=2, sample_size=32
    )
    theirs.bn.running_mean.normal_()
    theirs.bn.running_var.uniform_(0.5, 2.0)
    theirs.save_pretrained(tmp_path / "vae")
    return theirs.double().eval(), tmp_path / "vae"


FLUX2_TINY = {"preset": "f16d128", "latent_channels": 2} | TINY


def test_the_preset_of_flux2_is_diffusers_default():
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLFlux2(), AutoencoderKL(preset="f16d128")
    named = dict(theirs.config) | {"_class_name": "AutoencoderKLFlux2"}
    assert diffusers_format.differences(ours.architecture, diffusers_format.architecture(named, "config.json")) == []
    least = {"_class_name": "AutoencoderKLFlux2"}  # the defaults of keys that a config.json lacks
    assert diffusers_format.architecture(least, "config.json") == ours.architecture
    shapes = {key: value.shape for key, value in diffusers_format.to_diffusers(ours.state_dict()).items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("bn.")}
    assert (ours.channels, ours.factor) == (128, 16) == (theirs.bn.num_features, 16)


def test_latents_of_flux2_are_patched_and_normalized_as_in_its_pipeline(flux2):
    theirs, folder = flux2
    ours = AutoencoderKL(checkpoint=str(folder), **FLUX2_TINY)
    ours.load_weights()
    ours.double()
    norm = LatentNorm(8, eps=0.0).double()
    norm.set_statistics(*(value.double() for value in read_statistics(str(folder))))
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        reference = theirs.encode(x).latent_dist.mean
        # (channel, row, column) within a square, the order in which FLUX.2's pipeline flattens squares.
        patched = reference.reshape(2, 2, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 8, 2, 2)
        posterior = ours.encode(x)
        torch.testing.assert_close(posterior.mean, patched, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(norm(posterior.mean), theirs.bn(patched), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.decode(patched), theirs.decode(reference).sample, rtol=1e-9, atol=1e-11)


def test_an_exported_flux2_is_read_by_diffusers(flux2, tmp_path):
    theirs, folder = flux2
    ours = AutoencoderKL(checkpoint=str(folder), **FLUX2_TINY)
    ours.load_weights()
    mean, std = read_statistics(str(folder))
    norm = LatentNorm(8)
    norm.set_statistics(mean, std)
    states = {"tokenizer": ours.state_dict(), "latent_norm": norm.state_dict()}
    model = Exported(None, states, None, "ema", 1, 32, "a run")
    _, uses = diffusers_format.Diffusers(ours).to_files(tmp_path / "out", model)
    assert "AutoencoderKLFlux2.from_pretrained" in uses
    back = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path / "out").double().eval()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    for found, expected in zip(read_statistics(str(tmp_path / "out")), (mean, std)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [{"decoder_block_out_channels": [8, 8, 8, 8]}, {"patch_size": [2, 1]}])
def test_another_flux2_is_refused(flux2, change):
    file = flux2[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(WeightsError, match="not support"):
        AutoencoderKL(checkpoint=str(file.parent), **FLUX2_TINY).load_weights()


def test_a_patch_must_be_positive():
    with pytest.raises(ValueError, match=r"tokenizer\.patch = 0"):
        AutoencoderKL(patch=0)
