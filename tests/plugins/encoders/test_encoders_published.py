"""Plain vision transformer encoders against formulas: published layouts, preprocessing, and which weights are used."""

from __future__ import annotations

import functools

import pytest
import timm
import torch

from components import registry
from components.files.weights import WeightsError
from tests.support.encoder_formulas import (
    DEPTH,
    HALF,
    HEADS,
    IMAGENET,
    OPENAI,
    WIDTH,
    attend,
    clip_formula,
    clip_state,
    gelu,
    gelu_tanh,
    images,
    in_fp64,
    linear,
    linear_shapes,
    norm,
    norm_shapes,
    prepared,
    random_state,
    vit_formula,
    vit_shapes,
)


@pytest.fixture(autouse=True, scope="module")
def found():
    registry.discover("plugins")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make timm's named architectures narrow and shallow."""
    shrink(monkeypatch)


def shrink(monkeypatch, depth=DEPTH):
    sizes = {"embed_dim": WIDTH, "depth": depth, "num_heads": HEADS, "mlp_ratio": 4}
    monkeypatch.setattr(timm, "create_model", functools.partial(MAKE, **sizes))


MAKE = timm.create_model


def made(name, file, resolution=64, grid=4, **options):
    encoder = registry.encoders.get(name).cls(resolution, grid, checkpoint=str(file), **options)
    encoder.load_weights()
    return encoder


def agrees(encoder, x, tokens, vector):
    """Assert equal tokens and vectors: to 1e-10 in fp64; in fp32 without resizing, to 1e-5 of the largest value."""
    assert encoder(x).dtype == encoder.embed(x).dtype == torch.float32
    if x.shape[-1] == encoder.side:
        for found, expected in ((encoder(x), tokens), (encoder.embed(x), vector)):
            torch.testing.assert_close(found.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    torch.testing.assert_close(in_fp64(encoder, x), tokens, atol=1e-10, rtol=0)
    torch.testing.assert_close(encoder.embed(x.double()), vector, atol=1e-10, rtol=0)


# MAE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, patch, native, resolution, grid", [("l", 16, 14, 64, 4), ("l", 16, 14, 256, 16), ("h", 14, 16, 256, 16)]
)
@pytest.mark.parametrize("decoder", [False, True])
def test_mae(tmp_path, size, patch, native, resolution, grid, decoder):
    state = random_state(vit_shapes(native, patch))
    extra = {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(32, WIDTH)} if decoder else {}
    torch.save({"model": state | extra}, tmp_path / "mae.pth")
    encoder = made("mae", tmp_path / "mae.pth", resolution, grid, size=size)
    x = images(resolution)
    seen = prepared(x, patch * grid, IMAGENET)
    agrees(encoder, x, vit_formula(state, seen, grid, final_norm=False)[:, 1:], vit_formula(state, seen, grid)[:, 0])


# I-JEPA ------------------------------------------------------------------------------------------------------


def ijepa_file(path, native=16, patch=14, **wrapped):
    """The authors' training checkpoint, with two different networks."""
    shapes = vit_shapes(native, patch, class_token=False)
    encoder = random_state(shapes)
    target = {key: value * 1.1 for key, value in encoder.items()}
    tree = {
        "encoder": {f"module.{key}": value for key, value in encoder.items()},
        "predictor": {"module.mask_token": torch.zeros(1, 1, 8)},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "scaler": None,
        "target_encoder": {f"module.{key}": value for key, value in target.items()},
        "epoch": 300,
        "loss": 0.1,
    }
    torch.save({key: value for key, value in (tree | wrapped).items() if value is not ...}, path)
    return {"encoder": encoder, "target_encoder": target}


@pytest.mark.parametrize(
    "branch, resolution, grid",
    [("encoder", 56, 4), ("encoder", 256, 16), ("encoder", 320, 20), ("target_encoder", 128, 8)],
)
def test_ijepa(tmp_path, branch, resolution, grid):
    states = ijepa_file(tmp_path / "ijepa.pth.tar")
    encoder = made("ijepa", tmp_path / "ijepa.pth.tar", resolution, grid, branch=branch)
    x = images(resolution, batch=1)
    expected = vit_formula(states[branch], prepared(x, 14 * grid, IMAGENET), grid)
    assert expected.shape == (1, grid * grid, WIDTH)
    agrees(encoder, x, expected, expected.mean(1))


def test_ijepa_takes_the_context_encoder_unless_told(tmp_path):
    states = ijepa_file(tmp_path / "ijepa.pth.tar", native=28, patch=16)
    encoder = made("ijepa", tmp_path / "ijepa.pth.tar", size="h16_448")
    assert torch.equal(encoder.model.norm.weight, states["encoder"]["norm.weight"])


def test_ijepa_without_the_network_asked_for(tmp_path):
    ijepa_file(tmp_path / "ijepa.pth.tar", target_encoder=...)
    with pytest.raises(WeightsError, match=r"holds 'encoder', 'predictor'.*no 'target_encoder'.*branch = \"encoder\""):
        made("ijepa", tmp_path / "ijepa.pth.tar", branch="target_encoder")


# MoCo v3 -----------------------------------------------------------------------------------------------------


def moco_file(path, shapes, rename=lambda key: key):
    base = random_state(shapes)
    momentum = {key: value * 1.1 for key, value in base.items()}
    head = {"head.0.weight": torch.zeros(8, WIDTH), "head.1.running_mean": torch.zeros(8)}
    state = {"module.predictor.0.weight": torch.zeros(8, 8)}
    for name, network in (("base", base), ("momentum", momentum)):
        state |= {f"module.{name}_encoder.{rename(key)}": value for key, value in (network | head).items()}
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {}, "scaler": {}}, path)
    return {"base": base, "momentum": momentum}


@pytest.mark.parametrize("branch", ["base", "momentum"])
@pytest.mark.parametrize("size, heads", [("s", 12), ("b", HEADS)])
def test_mocov3(tmp_path, branch, size, heads):
    states = moco_file(tmp_path / "moco.pth.tar", vit_shapes(14, 16))
    encoder = made("mocov3", tmp_path / "moco.pth.tar", 256, 16, size=size, branch=branch)
    assert encoder.side == 256
    x = images(256, batch=1)
    expected = vit_formula(states[branch], prepared(x, 256, IMAGENET), 16, heads=heads)
    agrees(encoder, x, expected[:, 1:], expected[:, 0])


def test_mocov3_l_is_read_with_its_misnamed_modules(tmp_path, monkeypatch):
    shrink(monkeypatch, depth=15)

    def slip(key):
        for name in ("blocks.13.norm1", "blocks.13.mlp.fc1"):
            key = key.replace(name + ".", name + "3.")
        for name, slipped in (("norm2", "norm14"), ("mlp.fc2", "mlp.fc14")):
            key = key.replace(f"blocks.14.{name}.", f"blocks.14.{slipped}.")
        return key

    states = moco_file(tmp_path / "moco.pth.tar", vit_shapes(4, 16, depth=15), slip)
    keys = torch.load(tmp_path / "moco.pth.tar")["state_dict"]
    for slipped in ("blocks.13.norm13", "blocks.13.mlp.fc13", "blocks.14.norm14", "blocks.14.mlp.fc14"):
        assert f"module.base_encoder.{slipped}.bias" in keys
    encoder = made("mocov3", tmp_path / "moco.pth.tar", size="l")
    loaded = encoder.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in states["base"].items())


def test_mocov3_in_deit_layout(tmp_path):
    state = random_state(vit_shapes(4, 16))
    torch.save({"model": state}, tmp_path / "deit.pth")
    loaded = made("mocov3", tmp_path / "deit.pth").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


# DINO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch, native, resolution, grid", [(16, 14, 256, 16), (16, 14, 96, 4), (8, 28, 64, 4)])
def test_dino(tmp_path, patch, native, resolution, grid):
    state = random_state(vit_shapes(native, patch))
    torch.save(state, tmp_path / "dino.pth")
    encoder = made("dino", tmp_path / "dino.pth", resolution, grid, patch=patch)
    x = images(resolution, batch=1)
    n = grid * 16 // patch
    expected = vit_formula(state, prepared(x, 16 * grid, IMAGENET), n)
    tokens = expected[:, 1:].unflatten(1, (grid, n // grid, grid, n // grid)).mean((2, 4)).flatten(1, 2)
    agrees(encoder, x, tokens, expected[:, 0])


# CLIP and OpenCLIP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, patch, native, pair, act",
    [
        ("clip", {"size": "b32"}, 32, 7, OPENAI, lambda h: h * torch.sigmoid(1.702 * h)),
        ("clip", {"size": "b16"}, 16, 14, OPENAI, lambda h: h * torch.sigmoid(1.702 * h)),
        ("clip", {"size": "l14_336"}, 14, 24, OPENAI, lambda h: h * torch.sigmoid(1.702 * h)),
        ("openclip", {"size": "b16"}, 16, 14, OPENAI, gelu),
        ("openclip", {"size": "l14"}, 14, 16, HALF, gelu),
        ("openclip", {"size": "l14", "data": "datacompxl"}, 14, 16, OPENAI, gelu),
        ("openclip", {"size": "h14"}, 14, 16, OPENAI, gelu),
    ],
)
def test_clip_and_openclip(tmp_path, name, options, patch, native, pair, act):
    state = clip_state(native, patch)
    torch.save({"state_dict": state}, tmp_path / "clip.pt")
    encoder = made(name, tmp_path / "clip.pt", 64, 4, **options)
    x = images(64)
    torch.testing.assert_close(in_fp64(encoder, x), clip_formula(state, x, 4, pair, act), atol=1e-10, rtol=0)


# SigLIP ------------------------------------------------------------------------------------------------------


def siglip_state(native, patch):
    """timm's layout; OpenCLIP's files have it after the prefix "visual.trunk."."""
    shapes = vit_shapes(native, patch, class_token=False) | {"attn_pool.latent": (1, 1, WIDTH)}
    linears = {"q": (WIDTH, WIDTH), "kv": (2 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH)}
    linears |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    shapes |= linear_shapes({f"attn_pool.{key}": shape for key, shape in linears.items()})
    return random_state(shapes | norm_shapes("attn_pool.norm"))


def attention_pool(state, tokens):
    """Multihead attention pooling (Zhai et al. 2021, arXiv 2106.04560): one learned query."""
    p = {key.removeprefix("attn_pool."): value.double() for key, value in state.items() if "attn_pool" in key}
    q = linear(p["latent"].expand(len(tokens), -1, -1), p, "q.weight", "q.bias")
    k, v = linear(tokens, p, "kv.weight", "kv.bias").split(WIDTH, dim=-1)
    x = linear(attend(*(part.unflatten(-1, (HEADS, -1)) for part in (q, k, v))), p, "proj.weight", "proj.bias")
    h = gelu_tanh(linear(norm(x, p, "norm", 1e-6), p, "mlp.fc1.weight", "mlp.fc1.bias"))
    return (x + linear(h, p, "mlp.fc2.weight", "mlp.fc2.bias"))[:, 0]


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize(
    "name, size, patch", [("siglip", "b", 16), ("siglip", "so400m", 14), ("siglip2", "l", 16), ("siglip2", "g", 16)]
)
def test_siglip(tmp_path, name, size, patch, prefix):
    state = siglip_state(16, patch)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "siglip.pt")
    encoder = made(name, tmp_path / "siglip.pt", 64, 4, size=size)
    x = images(64)
    expected = vit_formula(state, prepared(x, patch * 4, HALF), 4, act=gelu_tanh)
    agrees(encoder, x, expected, attention_pool(state, expected))


# Order and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dino", "mae", "mocov3", "ijepa", "siglip", "siglip2"])
def test_images_are_normalized_and_then_resized(name):
    encoder = registry.encoders.get(name).cls(64, 5, pretrained=False)
    seen = []
    encoder.model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder.double()(images(64).double())
    expected = prepared(images(64), encoder.side, HALF if "siglip" in name else IMAGENET)
    torch.testing.assert_close(seen[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["mae", "mocov3", "ijepa", "dino", "siglip", "openclip"])
def test_a_wrong_file_is_refused_with_its_keys(tmp_path, name):
    torch.save({"state_dict": {"module.backbone.conv1.weight": torch.zeros(4)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError) as error:
        made(name, tmp_path / "other.pth")
    for text in (f"encoder {name}", "other.pth", "unexpected: module.backbone.conv1.weight", "missing", "mlp.fc2.bias"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "name, options, where",
    [
        ("mocov3", {"size": "s"}, "https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"),
        ("mocov3", {"size": "l"}, "https://github.com/LTH14/rcg"),
        ("ijepa", {}, "https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"),
    ],
)
def test_what_timm_has_no_copy_of_says_where_it_is(name, options, where):
    with pytest.raises(WeightsError) as error:
        registry.encoders.get(name).cls(64, 4, **options).load_weights()
    for text in (f"encoder {name}", f'[encoders.{name}] checkpoint = "FILE"', where, "pretrained = false"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("openclip", {"size": "h14", "data": "datacompxl"}, "sizes b32, b16, l14, not 'h14'"),
        ("dinov3", {"size": "b", "data": "sat493m"}, "sizes l, 7b, not 'b'"),
        ("perception_encoder", {"variant": "lang", "size": "b"}, "sizes l, g, not 'b'"),
    ],
)
def test_weights_that_do_not_exist_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        registry.encoders.get(name).cls(64, 4, **options)
