"""DINOv3 and Perception Encoder against formulas: rotary positions, published layouts, preprocessing, inner blocks."""

from __future__ import annotations

import functools
import math

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F

from components.files.weights import WeightsError
from plugins.encoders.dinov3 import DINOv3
from plugins.encoders.perception_encoder import PerceptionEncoder
from tests.support.encoder_formulas import (
    DEPTH,
    HALF,
    HEADS,
    IMAGENET,
    WIDTH,
    attend,
    constants,
    gelu,
    images,
    in_fp64,
    linear,
    linear_shapes,
    norm,
    norm_shapes,
    patches,
    positions,
    prepared,
    random_state,
    split_heads,
    vit_shapes,
)

ANGLES = 3e-6  # sines and cosines are in fp32
POOL_HEADS = 8
SATELLITE = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make timm's named architectures narrow and shallow."""
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 4}
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **sizes))


def rotated(x, angles, prefix, pairs):
    """Rotate pairs of features of (B, N, heads, d), except for the first ``prefix`` tokens.

    Args:
        angles: (tokens, d / 2), one for each pair.
        pairs: "halves": feature j with j + d / 2; "neighbors": 2 j with 2 j + 1.
    """
    angles = torch.cat([torch.zeros(prefix, angles.shape[1], dtype=torch.float64), angles])[:, None]
    first, second = x.chunk(2, dim=-1) if pairs == "halves" else (x[..., ::2], x[..., 1::2])
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned, dim=-1) if pairs == "halves" else torch.stack(turned, dim=-1).flatten(-2)


def cells(n, place):
    """Return (row, column) of each cell of an n x n grid, row-major, as transformed by ``place``."""
    return [(place(i), place(j)) for i in range(n) for j in range(n)]


# DINOv3 ------------------------------------------------------------------------------------------------------


def dinov3_state(hidden=None):
    """Keys and shapes of the authors' files; with ``hidden``, those of a gated feed-forward network."""
    shapes = vit_shapes(1, 16) | {"storage_tokens": (1, 4, WIDTH), "mask_token": (1, WIDTH)}
    del shapes["pos_embed"]
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.ls1.gamma": (WIDTH,), f"blocks.{i}.ls2.gamma": (WIDTH,)}
        if hidden is not None:
            for name in ("mlp.fc1", "mlp.fc2"):
                del shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"]
            linears = {"mlp.w1": (hidden, WIDTH), "mlp.w2": (hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
            shapes |= linear_shapes({f"blocks.{i}.{name}": shape for name, shape in linears.items()})
    state = random_state(shapes)
    state["rope_embed.periods"] = torch.ones(WIDTH // HEADS // 4)
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
    return state


def dinov3_formula(state, x, grid):
    p = {key: value.double() for key, value in state.items()}
    x = patches(x, p["patch_embed.proj.weight"]) + p["patch_embed.proj.bias"]
    prefix = torch.cat([p["cls_token"], p["storage_tokens"]], dim=1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    # Axial: half of the pairs rotate with the row, half with the column, both in [-1, 1].
    count = WIDTH // HEADS // 4
    periods = [100 ** (j / count) for j in range(count)]
    place = cells(grid, lambda i: 2 * (i + 0.5) / grid - 1)
    angles = torch.tensor([[2 * math.pi * c / period for c in cell for period in periods] for cell in place]).double()
    for i in range(DEPTH):
        b = f"blocks.{i}"
        bias = p[f"{b}.attn.qkv.bias"] * p[f"{b}.attn.qkv.bias_mask"]
        qkv = norm(x, p, f"{b}.norm1", 1e-5) @ p[f"{b}.attn.qkv.weight"].T + bias
        q, k, v = split_heads(qkv, HEADS)
        h = attend(rotated(q, angles, 5, "halves"), rotated(k, angles, 5, "halves"), v)
        x = x + p[f"{b}.ls1.gamma"] * linear(h, p, f"{b}.attn.proj.weight", f"{b}.attn.proj.bias")
        h = norm(x, p, f"{b}.norm2", 1e-5)
        if f"{b}.mlp.w1.weight" in p:
            gate = linear(h, p, f"{b}.mlp.w1.weight", f"{b}.mlp.w1.bias")
            h = gate * torch.sigmoid(gate) * linear(h, p, f"{b}.mlp.w2.weight", f"{b}.mlp.w2.bias")
            h = linear(h, p, f"{b}.mlp.w3.weight", f"{b}.mlp.w3.bias")
        else:
            h = gelu(linear(h, p, f"{b}.mlp.fc1.weight", f"{b}.mlp.fc1.bias"))
            h = linear(h, p, f"{b}.mlp.fc2.weight", f"{b}.mlp.fc2.bias")
        x = x + p[f"{b}.ls2.gamma"] * h
    return norm(x, p, "norm", 1e-5)


def dinov3_prepared(x, side, pair=IMAGENET):
    mean, std = constants(pair)
    x = F.interpolate((x.double() + 1) / 2, (side, side), mode="bilinear", antialias=True)
    return (x - mean) / std


@pytest.mark.parametrize(
    "options, pair, resolution, grid",
    [
        ({"size": "b"}, IMAGENET, 64, 4),
        ({"size": "b"}, IMAGENET, 160, 4),
        ({"size": "l", "data": "sat493m"}, SATELLITE, 96, 6),
        ({"size": "s+"}, IMAGENET, 96, 6),
    ],
)
def test_dinov3(tmp_path, options, pair, resolution, grid):
    encoder = DINOv3(resolution, grid, checkpoint=str(tmp_path / "dinov3.pth"), **options)
    gated = getattr(encoder.model.blocks[0].mlp, "fc1_g", None)
    state = dinov3_state(hidden=None if gated is None else gated.out_features)
    torch.save(state, tmp_path / "dinov3.pth")
    encoder.load_weights()
    x = images(resolution)
    expected = dinov3_formula(state, dinov3_prepared(x, 16 * grid, pair), grid)
    torch.testing.assert_close(in_fp64(encoder, x), expected[:, 5:], atol=ANGLES, rtol=0)
    torch.testing.assert_close(encoder.embed(x.double()), expected[:, 0], atol=ANGLES, rtol=0)


def test_weights_behind_a_gate_say_both_ways(monkeypatch, tmp_path):
    def gated(*args, **kwargs):
        raise PermissionError("403: access to this repository is restricted")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", gated)
    with pytest.raises(WeightsError) as error:
        DINOv3(64, 4, size="s").load_weights()
    for text in (
        "encoder dinov3: the weights timm/vit_small_patch16_dinov3_qkvb.lvd1689m",
        "access to this repository is restricted",
        "run once with network access",
        '[encoders.dinov3] checkpoint = "FILE"',
    ):
        assert text in str(error.value)


# Perception Encoder ------------------------------------------------------------------------------------------


def pe_state(native, patch, class_token=True, core=True, scale=False):
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (class_token + native**2, WIDTH),
        "conv1.weight": (WIDTH, 3, patch, patch),
    } | norm_shapes("ln_pre")
    if class_token:
        shapes["class_embedding"] = (WIDTH,)
    layers = [f"transformer.resblocks.{i}" for i in range(DEPTH)]
    if core:
        shapes |= {"proj": (WIDTH, 32), "attn_pool.probe": (1, 1, WIDTH)} | norm_shapes(
            "ln_post", "attn_pool.layernorm"
        )
        layers.append("attn_pool")
    for b in layers:
        shapes |= {f"{b}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{b}.attn.in_proj_bias": (3 * WIDTH,)}
        linears = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
        shapes |= linear_shapes({f"{b}.{name}": shape for name, shape in linears.items()})
        if b != "attn_pool":
            shapes |= norm_shapes(f"{b}.ln_1", f"{b}.ln_2")
            if scale:
                shapes |= {f"{b}.ls_1.gamma": (WIDTH,), f"{b}.ls_2.gamma": (WIDTH,)}
    return random_state(shapes)


def pe_formula(state, x, grid, blocks=DEPTH):
    """Return all tokens after a block, without a norm."""
    p = {key: value.double() for key, value in state.items()}
    x = patches(x, p["conv1.weight"])
    table, first = p["positional_embedding"], int("class_embedding" in p)
    place = positions(table[first:], grid, mode="bilinear", antialias=False)
    if first:
        x = torch.cat([p["class_embedding"].expand(len(x), 1, -1), x], dim=1)
        place = torch.cat([table[:1], place])
    x = norm(x + place, p, "ln_pre", 1e-5)
    # Axial: the first half of the pairs rotates with the column, the rest with the row; a class token is at 0.
    count = WIDTH // HEADS // 4
    frequencies = [10_000 ** (-j / count) for j in range(count)]
    angles = [[c * f for c in reversed(cell) for f in frequencies] for cell in cells(grid, lambda i: i + first)]
    angles = torch.tensor(angles, dtype=torch.float64)
    for i in range(blocks):
        b = f"transformer.resblocks.{i}"
        qkv = linear(norm(x, p, f"{b}.ln_1", 1e-5), p, f"{b}.attn.in_proj_weight", f"{b}.attn.in_proj_bias")
        q, k, v = split_heads(qkv, HEADS)
        h = attend(rotated(q, angles, first, "neighbors"), rotated(k, angles, first, "neighbors"), v)
        x = x + p.get(f"{b}.ls_1.gamma", 1) * linear(h, p, f"{b}.attn.out_proj.weight", f"{b}.attn.out_proj.bias")
        h = gelu(linear(norm(x, p, f"{b}.ln_2", 1e-5), p, f"{b}.mlp.c_fc.weight", f"{b}.mlp.c_fc.bias"))
        x = x + p.get(f"{b}.ls_2.gamma", 1) * linear(h, p, f"{b}.mlp.c_proj.weight", f"{b}.mlp.c_proj.bias")
    return x


def pe_pool(state, tokens):
    """The attention pool of "core": one learned query over all tokens after the final norm."""
    p = {key: value.double() for key, value in state.items()}
    tokens = norm(tokens, p, "ln_post", 1e-5)
    p = {key.removeprefix("attn_pool."): value for key, value in p.items() if key.startswith("attn_pool.")}
    weights, biases = p["attn.in_proj_weight"].chunk(3), p["attn.in_proj_bias"].chunk(3)
    inputs = (p["probe"].expand(len(tokens), -1, -1), tokens, tokens)
    q, k, v = ((x @ w.T + b).unflatten(-1, (POOL_HEADS, -1)) for x, w, b in zip(inputs, weights, biases))
    x = linear(attend(q, k, v), p, "attn.out_proj.weight", "attn.out_proj.bias")
    h = gelu(linear(norm(x, p, "layernorm", 1e-5), p, "mlp.c_fc.weight", "mlp.c_fc.bias"))
    return (x + linear(h, p, "mlp.c_proj.weight", "mlp.c_proj.bias"))[:, 0]


@pytest.mark.parametrize(
    "variant, size, patch, native, class_token, scale, resolution, grid",
    [
        ("core", "b", 16, 14, True, False, 64, 4),
        ("core", "b", 16, 14, True, False, 224, 14),
        ("core", "l", 14, 24, True, False, 64, 4),
        ("core", "g", 14, 32, False, False, 64, 4),
        ("spatial", "b", 16, 32, True, False, 96, 6),
        ("spatial", "g", 14, 32, False, True, 64, 4),
        ("lang", "l", 14, 32, True, True, 64, 4),
    ],
)
@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_perception_encoder(tmp_path, variant, size, patch, native, class_token, scale, resolution, grid, prefix):
    state = pe_state(native, patch, class_token, variant == "core", scale)
    text = {"text_projection": torch.zeros(32, 32)} if prefix else {}
    torch.save(text | {prefix + key: value for key, value in state.items()}, tmp_path / "pe.pt")
    encoder = PerceptionEncoder(resolution, grid, variant=variant, size=size, checkpoint=str(tmp_path / "pe.pt"))
    encoder.load_weights()
    x = images(resolution)
    seen = prepared(x, patch * grid, HALF, resize_first=True, mode="bilinear")
    expected = pe_formula(state, seen, grid)
    torch.testing.assert_close(in_fp64(encoder, x), expected[:, class_token:], atol=ANGLES, rtol=0)
    vector = pe_pool(state, expected) if variant == "core" else expected[:, class_token:].mean(1)
    torch.testing.assert_close(encoder.embed(x.double()), vector, atol=ANGLES, rtol=0)


@pytest.mark.parametrize("layer", [0, -2])
@pytest.mark.parametrize("normed", [False, True])
def test_an_inner_block_of_perception_encoder(tmp_path, layer, normed):
    state = pe_state(14, 16)
    torch.save(state, tmp_path / "pe.pt")
    encoder = PerceptionEncoder(64, 4, variant="core", layer=layer, norm=normed, checkpoint=str(tmp_path / "pe.pt"))
    encoder.load_weights()
    x = images(64)
    expected = pe_formula(state, prepared(x, 64, HALF, resize_first=True, mode="bilinear"), 4, blocks=1)
    if normed:
        expected = norm(expected, {key: value.double() for key, value in state.items()}, "ln_post", 1e-5)
    torch.testing.assert_close(in_fp64(encoder, x), expected[:, 1:], atol=ANGLES, rtol=0)
    torch.testing.assert_close(encoder.embed(x.double()), expected[:, 1:].mean(1), atol=ANGLES, rtol=0)


def test_timms_own_layout_is_read_too(tmp_path):
    state = timm.create_model("vit_pe_core_base_patch16_224", pretrained=False, num_classes=0).state_dict()
    torch.save(state, tmp_path / "timm.pt")
    encoder = PerceptionEncoder(224, 14, variant="core", checkpoint=str(tmp_path / "timm.pt"))
    encoder.load_weights()
    assert all(torch.equal(encoder.model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("make", [DINOv3, functools.partial(PerceptionEncoder, variant="core")])
def test_what_the_meta_device_loses_is_made_again_or_named(tmp_path, make):
    encoder = make(64, 4, pretrained=False)
    torch.save(encoder.model.state_dict(), tmp_path / "timm.pt")
    with torch.device("meta"):
        other = make(64, 4, checkpoint=str(tmp_path / "timm.pt"))
    other.to_empty(device="cpu")
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.fill_(math.nan)
    if not hasattr(encoder.model.rope, "init_non_persistent_buffers"):  # timm releases of 2025
        with pytest.raises(WeightsError, match=r"created on the meta device, where \S+ lost"):
            other.load_weights()
        return
    other.load_weights()
    assert torch.equal(other(images(64)), encoder(images(64)))


def test_an_inner_block_compiles_without_a_graph_break():
    encoder = PerceptionEncoder(64, 4, layer=0, pretrained=False)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(64)), encoder(images(64)))
