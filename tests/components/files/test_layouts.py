"""Names of other programs: every key of the published checkpoints maps in both directions, and diffusers agrees."""

import itertools
import json
import re

import pytest
import torch

from components.contracts import LatentShape
from components.files import repae, weights_file
from components.files.adapter import named
from components.files.weights import WeightsError, check_fit, compact
from components.nn.latent_norm import LatentNorm
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine
from plugins.losses.patchgan import PatchGAN
from plugins.tokenizers.autoencoder_kl import AutoencoderKL, diffusers_format
from tests.support import DATA

# Names and shapes of the published checkpoints; "{0..27}" stands for each number in the range.
KEYS = json.loads((DATA / "published_keys.json").read_text())
TINY = {
    "latent_channels": 4,
    "channels": 8,
    "multipliers": [1, 2, 3],
    "attention_levels": [],
    "res_blocks": 1,
    "mid_attention": True,
    "norm_groups": 4,
    "quant_conv": True,
    "patch": 1,
}
TINIES = {
    "f8-like": TINY,
    "f16-like": TINY | {"latent_channels": 8, "multipliers": [1, 1, 2, 2, 4], "attention_levels": [4]},
    "without quant_conv": TINY | {"quant_conv": False},
    "without attention": TINY | {"mid_attention": False},
    "attention everywhere": TINY | {"attention_levels": [0, 1, 2], "res_blocks": 2},
}


def expand(key: str) -> list[str]:
    parts = re.split(r"\{(.*?)\}", key)
    choices = [[part] if i % 2 == 0 else numbers(part) for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def numbers(text: str) -> list[str]:
    if ".." in text:
        first, last = map(int, text.split(".."))
        return [str(n) for n in range(first, last + 1)]
    return text.split(",")


def listed(name: str, count: int) -> dict[str, torch.Tensor]:
    """A published state dict on the meta device."""
    found = {key: torch.empty(s, device="meta") for pattern, s in KEYS[name].items() for key in expand(pattern)}
    assert len(found) == count
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "latent", "patch"),
    [("SiT-XL/2 f8d4", LatentShape(4, 32, 32), 2), ("SiT-XL/1 f16d32", LatentShape(32, 16, 16), 1)],
)
def test_published_denoisers_map_both_ways(name, latent, patch):
    theirs = listed(name, 301)
    with torch.device("meta"):
        denoiser = SiT(latent, 1000, size="XL", patch_size=patch)
        ours = {
            "denoiser": denoiser.state_dict(),
            "heads": Cosine().make_heads(denoiser.width, [768], denoiser.grid).state_dict(),
            "latent_norm": LatentNorm(latent.channels).state_dict(),
        }
    same(repae.join_denoiser(ours), theirs)
    split = repae.split_denoiser(theirs)
    assert split.keys() == ours.keys()
    for part, state in ours.items():
        same(split[part], state)


@pytest.mark.parametrize(("preset", "count"), [("f8d4", 248), ("f16d32", 342)])
def test_published_tokenizers_map_to_ours_and_diffusers_both_ways(preset, count):
    diffusers = pytest.importorskip("diffusers")
    theirs = listed(f"vae {preset}", count)
    with torch.device("meta"):
        tokenizer = AutoencoderKL(preset=preset)
        ours = tokenizer.state_dict()
        config = diffusers_format.config(tokenizer.architecture, 256, None, None)
        foreign = diffusers.AutoencoderKL.from_config(config).state_dict()
    same(ours, theirs)
    same(diffusers_format.to_diffusers(ours), foreign)
    same(diffusers_format.from_diffusers(foreign), theirs)


def test_published_discriminator_maps_both_ways():
    theirs = listed("discriminator", 22)
    with torch.device("meta"):
        gan = PatchGAN()
    ours, adapter = gan.state_dict(), named(gan, "repae")
    same(adapter.to_foreign(ours), theirs)
    back = adapter.from_file(weights_file.WeightsFile("x.pt", theirs), "discriminator", "x")["discriminator"]
    same(back, ours)
    assert back["ema_real"].item() == 0


@pytest.mark.parametrize("architecture", TINIES.values(), ids=TINIES)
def test_diffusers_reconstructs_the_same_image(architecture):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(**architecture).double()
    config = diffusers_format.config(tokenizer.architecture, 32, torch.randn(4), torch.rand(4))
    foreign = diffusers.AutoencoderKL.from_config(config).double()
    foreign.load_state_dict(diffusers_format.to_diffusers(tokenizer.state_dict()))
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        ours = tokenizer.encode(x)
        theirs = foreign.encode(x).latent_dist
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.std, theirs.std, rtol=0, atol=1e-9)
        torch.testing.assert_close(tokenizer.decode(ours.mean), foreign.decode(theirs.mean).sample, rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", TINIES.values(), ids=TINIES)
def test_architecture_survives_config_json(architecture):
    config = json.loads(json.dumps(diffusers_format.config(architecture, 32, None, None)))
    found = diffusers_format.architecture(config, "config.json")
    assert not diffusers_format.differences(architecture, found)
    state = AutoencoderKL(**architecture).state_dict()
    same(AutoencoderKL(**found).state_dict(), state)
    back = diffusers_format.from_diffusers(diffusers_format.to_diffusers(state))
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_old_diffusers_names():
    """Files from before diffusers 0.17 name the attention's layers query, key, value and proj_attn."""
    state = AutoencoderKL(**TINY).state_dict()
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in diffusers_format.to_diffusers(state).items():
        for name, former in new.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{former}.")
        old[key] = value
    assert any(".proj_attn.weight" in key for key in old)
    back = diffusers_format.from_diffusers(old)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_latent_statistics_in_config_json():
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([3.0, 4.0])
    config = diffusers_format.config(TINY | {"latent_channels": 2}, 32, mean, std)
    assert config["latents_mean"] == [1.0, -1.0] and config["latents_std"] == [3.0, 4.0]
    # One number each for all elements: mean 0, variance (9 + 16) / 2 + 1.
    assert config["shift_factor"] == 0.0 and config["scaling_factor"] == pytest.approx(13.5**-0.5)
    found = weights_file.stated_statistics(config)
    assert torch.equal(found[0], mean) and torch.equal(found[1], std)

    only = {"latent_channels": 3, "scaling_factor": 0.5, "shift_factor": 0.25}
    found = weights_file.stated_statistics(only)
    assert found[0].tolist() == [0.25] * 3 and found[1].tolist() == [2.0] * 3
    unknown = diffusers_format.config(TINY, 32, None, None)
    assert unknown["scaling_factor"] == 1.0 and "latents_mean" not in unknown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"in_channels": 1}, "in_channels = 1"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv"),
        ({"down_block_types": ["AttnDownEncoderBlock2D", *["DownEncoderBlock2D"] * 2]}, "attention"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "DownBlock2D"),
    ],
)
def test_foreign_architectures_are_refused(change, words):
    config = diffusers_format.config(TINY, 32, None, None) | change
    with pytest.raises(WeightsError, match=words):
        diffusers_format.architecture(config, "config.json")


def test_statistics_as_published():
    norm = LatentNorm(3)
    norm.set_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0]))
    stats = repae.latents_stats(norm.state_dict())
    assert stats["latents_scale"].shape == stats["latents_bias"].shape == (1, 3, 1, 1)
    assert stats["latents_scale"].flatten().tolist() == [2.0, 0.5, 0.25]
    assert stats["latents_bias"].flatten().tolist() == [1.0, 2.0, 3.0]


def test_messages_name_every_key():
    own = {f"blocks.{i}.{name}": torch.empty(2, device="meta") for i in range(30) for name in ("a.weight", "b")}
    with pytest.raises(WeightsError) as error:
        check_fit(own, {"blocks.3.b": torch.zeros(3), "blocks.7.c": torch.zeros(1)}, "denoiser", "x.pt")
    text = str(error.value)
    assert "denoiser: 'x.pt'" in text
    assert "59 missing: blocks.{0..29}.a.weight, " in text and "blocks.{0,1,2,4,5" in text
    assert "1 unexpected: blocks.7.c" in text
    assert "1 with a different shape: blocks.3.b: file (3,), expected (2,)" in text


def test_compact_loses_no_key():
    for name in KEYS:
        keys = [key for pattern in KEYS[name] for key in expand(pattern)]
        short = list(compact(keys))
        assert sorted(key for pattern in short for key in expand(pattern)) == sorted(keys)
        assert len(short) <= len(keys)
    assert compact(["a.1", "a.2"], 2) == ["a.1", "a.2"]


def test_left_out_names_groups():
    keys = ["opt.state.0.exp_avg", "opt.state.0.step", "state_dict.loss.discriminator.main.0.weight", "ema_real", "vae"]
    file = weights_file.WeightsFile("x.pt", dict.fromkeys(keys, torch.zeros(1)), used={"vae"})
    assert weights_file.left_out(file) == "opt.* (2 tensors), state_dict.loss.discriminator.* (1 tensors), ema_real"
