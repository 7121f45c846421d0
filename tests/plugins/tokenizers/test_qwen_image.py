"""The tokenizer of Qwen-Image equals diffusers' class on single images; import and export."""

import functools
import json

import pytest
import torch

from components.files.weights import WeightsError
from plugins.tokenizers.qwen_image import QwenImageVAE, diffusers_format
from tests.support import toys
from trainer.__main__ import main
from trainer.run.initial_statistics import read_statistics

diffusers = pytest.importorskip("diffusers")

TINY = {"channels": 8, "multipliers": [1, 2, 3], "res_blocks": 1, "latent_channels": 4}
THEIRS = {"base_dim": 8, "dim_mult": [1, 2, 3], "num_res_blocks": 1, "z_dim": 4, "temperal_downsample": [False, True]}


@pytest.fixture
def folder(tmp_path):
    """diffusers' tiny module in fp64, and the folder it was saved to."""
    torch.manual_seed(0)
    statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    theirs = diffusers.AutoencoderKLQwenImage(**THEIRS, **statistics)
    for name, parameter in theirs.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "vae")
    return theirs.double().eval(), tmp_path / "vae"


@pytest.fixture
def ours(folder):
    tokenizer = QwenImageVAE(**TINY, checkpoint=str(folder[1]))
    tokenizer.load_weights()
    return tokenizer.double()


def same(ours, theirs):
    for module in theirs.modules():
        if type(module).__name__ == "QwenImageUpsample":  # rounds to fp32
            module.forward = functools.partial(torch.nn.Upsample.forward, module)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior, reference = ours.encode(x), theirs.encode(x[:, :, None]).latent_dist
        torch.testing.assert_close(posterior.mean[:, :, None], reference.mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(posterior.std[:, :, None], reference.std, rtol=1e-10, atol=1e-12)
        expected = theirs.decode(reference.mean).sample[:, :, 0]
        torch.testing.assert_close(ours.decode(posterior.mean).clamp(-1, 1), expected, rtol=1e-10, atol=1e-12)
        assert expected.std() > 0.01 and expected.abs().mean() < 0.99


def test_encodes_and_decodes_a_frame_as_diffusers_does(folder, ours):
    same(ours, folder[0])


def test_the_default_is_the_published_architecture():
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLQwenImage(), QwenImageVAE()
        shapes = {k: v.shape for k, v in diffusers_format.to_diffusers(ours.state_dict()).items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def test_an_exported_folder_is_the_same_model_for_images(ours, tmp_path):
    config = {"_class_name": diffusers_format.CLASS, **THEIRS}
    diffusers_format.write_folder(tmp_path / "out", diffusers_format.to_diffusers(ours.state_dict()), config)
    back = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "out", torch_dtype=torch.float64)
    same(ours, back.eval())
    kept = diffusers_format.from_diffusers(back.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in ours.state_dict().items())


def test_the_statistics_of_the_folder_are_read(folder):
    mean, std = read_statistics(str(folder[1]))
    assert mean.tolist() == [1.0, 2.0, 3.0, 4.0] and std.tolist() == [0.5, 1.0, 2.0, 4.0]


def test_another_architecture_names_the_options(folder):
    with pytest.raises(WeightsError, match=r"multipliers = \[1, 2, 3\]") as refusal:
        QwenImageVAE(channels=8, res_blocks=1, latent_channels=4, checkpoint=str(folder[1])).load_weights()
    assert "channels = " not in str(refusal.value).replace("multipliers", "")


def test_another_class_is_refused(folder):
    file = folder[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(WeightsError, match="'AutoencoderKLWan'; expected 'AutoencoderKLQwenImage'"):
        QwenImageVAE(**TINY, checkpoint=str(file.parent)).load_weights()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"channels": 0}, "tokenizer.channels = 0"),
        ({"multipliers": []}, "tokenizer.multipliers"),
        ({"channels": 3, "multipliers": [2, 1]}, "expected an even product"),
    ],
)
def test_impossible_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        QwenImageVAE(**options)


def test_bf16_is_normalized_in_fp32(ours):
    norm = ours.float().encoder.norm_out
    x = torch.randn(2, norm.gamma.shape[0], 4, 4).bfloat16()
    expected = torch.nn.functional.normalize(x.float(), dim=1).bfloat16() * x.shape[1] ** 0.5 * norm.gamma
    assert torch.equal(norm(x), expected)


@pytest.mark.long
def test_trains_exports_and_samples(tmp_path):
    """Jointly, from a folder of diffusers and back to one."""
    torch.manual_seed(0)
    diffusers.AutoencoderKLQwenImage(
        **THEIRS, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    text = toys.TOML
    head, tail = text.split("[tokenizer]\n")
    table = '[tokenizer]\nname = "qwen_image_vae"\nchannels = 8\nmultipliers = [1, 2, 3]\nres_blocks = 1\n'
    table += f'latent_channels = 4\ncheckpoint = "{tmp_path / "vae"}"\n\n'
    (tmp_path / "toy.toml").write_text(f"{head}{table}{tail[tail.index('[denoiser]') :]}")
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "toy.toml"), f"--run.dir={run}", "--training.steps=2"]) == 0
    assert main(["export", str(run), "--format=diffusers", f"--out={tmp_path / 'out'}"]) == 0
    back = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "out")
    before = diffusers.AutoencoderKLQwenImage.from_pretrained(tmp_path / "vae")
    weight = "encoder.conv_in.weight"
    assert not torch.equal(back.state_dict()[weight][:, :, -1], before.state_dict()[weight][:, :, -1])
    mean, std = read_statistics(str(tmp_path / "out"))
    assert mean.abs().max() > 0 and (std - 1).abs().max() > 0
