"""Alignment encoders: their arithmetic against plain formulas, their weights, and what they say when those lack.

Checkpoints are made here with seeded random weights under the original authors' key names, at reduced width and
depth; the formulas below read the same file, so conversion and arithmetic are checked together.
"""

from __future__ import annotations

import functools
import math
import time

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from components import registry
from components.contracts import Encoder
from components.timm_encoder import TimmEncoder
from components.weights import WeightsError
from plugins.encoders.clip import CLIP
from plugins.encoders.dinov2 import DINOv2

WIDTH, DEPTH, HEADS, PATCH = 48, 2, 4, 14
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """timm makes the named architectures narrow and shallow."""
    make = functools.partial(timm.create_model, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    monkeypatch.setattr(timm, "create_model", make)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As HF_HUB_OFFLINE=1 with an empty cache; returns the cache's folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def images(side: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1


def in_fp64(encoder: TimmEncoder, x: torch.Tensor) -> torch.Tensor:
    return encoder.double()(x.double())


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Values of every scale that matters: weights small enough that a norm's epsilon shows in the result."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key, value in state.items():
        is_norm = "norm" in key or "ln_" in key
        if is_norm and key.endswith("weight"):
            value.mul_(0.2).add_(1)
        elif "gamma" in key:
            value.mul_(0.1).add_(0.5)
        elif value.ndim == 2 and "blocks" in key:
            value.mul_(1.5 / math.sqrt(value.shape[1]))
        else:
            value.mul_(0.02)
    return state


def dinov2_state(registers: bool = False, swiglu: bool = False, grid: int = 37) -> dict[str, torch.Tensor]:
    """Keys and shapes of the authors' DINOv2 files."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + grid * grid, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        shapes["register_tokens"] = (1, 4, WIDTH)
    hidden = 128 if swiglu else 4 * WIDTH
    for i in range(DEPTH):
        linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        if swiglu:
            linears |= {"mlp.w12": (2 * hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
        else:
            linears |= {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (WIDTH,), f"blocks.{i}.{name}.bias": (WIDTH,)}
        for name in ("ls1", "ls2"):
            shapes[f"blocks.{i}.{name}.gamma"] = (WIDTH,)
    return random_state(shapes)


def clip_state(grid: int = 16) -> dict[str, torch.Tensor]:
    """Keys and shapes of OpenAI's CLIP, with two of the text tower's."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 32),
        "ln_final.weight": (32,),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + grid * grid, WIDTH),
        "visual.proj": (WIDTH, 32),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (WIDTH,), f"visual.{name}.bias": (WIDTH,)}
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
        linears = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (WIDTH,), f"{block}.{name}.bias": (WIDTH,)}
    return random_state(shapes)


# Plain formulas, in fp64 -------------------------------------------------------------------------------------


def constants(pair):
    return [torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in pair]


def norm(x, p, key, eps):
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * p[key + ".weight"] + p[key + ".bias"]


def linear(x, p, weight, bias):
    return x @ p[weight].T + p[bias]


def attention(x, p, weight, bias):
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in linear(x, p, weight, bias).split(WIDTH, dim=-1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH // HEADS)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def patches(x, weight):
    """Every patch, rows first, against the convolution's weights: (B, N, WIDTH)."""
    n = x.shape[-1] // PATCH
    tiles = [
        x[:, :, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)].flatten(1) for i in range(n) for j in range(n)
    ]
    return torch.stack(tiles, dim=1) @ weight.flatten(1).T


def positions(table, grid):
    """(n * n, WIDTH) -> (grid * grid, WIDTH)."""
    n = math.isqrt(len(table))
    planes = table.T.reshape(1, WIDTH, n, n)
    if n != grid:
        planes = F.interpolate(planes, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return planes[0].flatten(1).T


def dinov2_formula(state, x, grid):
    p = {key: value.double() for key, value in state.items()}
    mean, std = constants(IMAGENET)
    x = F.interpolate(((x.double() + 1) / 2 - mean) / std, (PATCH * grid, PATCH * grid), mode="bicubic")
    x = patches(x, p["patch_embed.proj.weight"]) + p["patch_embed.proj.bias"]
    x = x + positions(p["pos_embed"][0, 1:], grid)
    prefix = [p["cls_token"] + p["pos_embed"][:, :1]]
    if "register_tokens" in p:
        prefix.append(p["register_tokens"])  # without a position
    prefix = torch.cat(prefix, dim=1)
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        h = attention(norm(x, p, f"{b}.norm1", 1e-6), p, f"{b}.attn.qkv.weight", f"{b}.attn.qkv.bias")
        x = x + p[f"{b}.ls1.gamma"] * linear(h, p, f"{b}.attn.proj.weight", f"{b}.attn.proj.bias")
        h = norm(x, p, f"{b}.norm2", 1e-6)
        if f"{b}.mlp.w12.weight" in p:
            gate, value = linear(h, p, f"{b}.mlp.w12.weight", f"{b}.mlp.w12.bias").chunk(2, dim=-1)
            h = linear(gate * torch.sigmoid(gate) * value, p, f"{b}.mlp.w3.weight", f"{b}.mlp.w3.bias")
        else:
            h = linear(h, p, f"{b}.mlp.fc1.weight", f"{b}.mlp.fc1.bias")
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
            h = linear(h, p, f"{b}.mlp.fc2.weight", f"{b}.mlp.fc2.bias")
        x = x + p[f"{b}.ls2.gamma"] * h
    return norm(x, p, "norm", 1e-6)[:, prefix.shape[1] :]


def clip_formula(state, x, grid):
    p = {key.removeprefix("visual."): value.double() for key, value in state.items() if key.startswith("visual.")}
    mean, std = constants(OPENAI)
    x = (F.interpolate((x.double() + 1) / 2, (PATCH * grid, PATCH * grid), mode="bicubic") - mean) / std
    x = patches(x, p["conv1.weight"])
    x = torch.cat([p["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    table = p["positional_embedding"]
    x = norm(x + torch.cat([table[:1], positions(table[1:], grid)]), p, "ln_pre", 1e-5)
    for i in range(DEPTH):
        b = f"transformer.resblocks.{i}"
        h = attention(norm(x, p, f"{b}.ln_1", 1e-5), p, f"{b}.attn.in_proj_weight", f"{b}.attn.in_proj_bias")
        x = x + linear(h, p, f"{b}.attn.out_proj.weight", f"{b}.attn.out_proj.bias")
        h = linear(norm(x, p, f"{b}.ln_2", 1e-5), p, f"{b}.mlp.c_fc.weight", f"{b}.mlp.c_fc.bias")
        x = x + linear(h * torch.sigmoid(1.702 * h), p, f"{b}.mlp.c_proj.weight", f"{b}.mlp.c_proj.bias")
    return x[:, 1:]  # neither ln_post nor proj


# Arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, registers, resolution, grid",
    [
        ("b", False, 32, 4),
        ("b", False, 128, 8),
        ("b", False, 256, 16),
        ("b", False, 512, 32),
        ("b", True, 256, 16),
        ("b", True, 512, 32),
        ("g", False, 128, 8),  # the SwiGLU feed-forward network
    ],
)
def test_dinov2_equals_its_formula(small, tmp_path, size, registers, resolution, grid):
    state = dinov2_state(registers, swiglu=size == "g")
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = DINOv2(resolution, grid, size=size, registers=registers, checkpoint=str(tmp_path / "dinov2.pth"))
    encoder.load_weights()
    x = images(resolution, batch=1 if grid > 16 else 2)
    expected = dinov2_formula(state, x, grid)
    assert expected.shape == (len(x), grid * grid, WIDTH)
    assert encoder(x).dtype == torch.float32
    # fp32 places bicubic samples to 1e-5 pixels, which shows on white noise.
    torch.testing.assert_close(encoder(x).double(), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(in_fp64(encoder, x), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("resolution, grid", [(32, 4), (128, 8), (256, 16), (512, 32)])
def test_clip_equals_its_formula(small, tmp_path, resolution, grid):
    state = clip_state()
    torch.save(state, tmp_path / "clip.pt")
    encoder = CLIP(resolution, grid, checkpoint=str(tmp_path / "clip.pt"))
    encoder.load_weights()
    x = images(resolution, batch=1 if grid > 16 else 2)
    expected = clip_formula(state, x, grid)
    assert expected.shape == (len(x), grid * grid, WIDTH)
    torch.testing.assert_close(in_fp64(encoder, x), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name, resize_first", [("dinov2", False), ("clip", True)])
def test_images_are_prepared_in_the_published_order(small, name, resize_first):
    encoder = registry.encoders.get(name).cls(256, 16, pretrained=False)
    seen = []
    encoder.model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = images(256)
    encoder(x)
    mean, std = (c.float() for c in constants(OPENAI if name == "clip" else IMAGENET))
    expected = (x + 1) / 2
    if resize_first:
        expected = (F.interpolate(expected, (224, 224), mode="bicubic") - mean) / std
    else:
        expected = F.interpolate((expected - mean) / std, (224, 224), mode="bicubic")
    assert torch.equal(seen[0], expected)


def test_images_of_the_right_size_are_not_resized(small, monkeypatch):
    encoder = DINOv2(56, 4, pretrained=False)
    monkeypatch.setattr(F, "interpolate", None)
    assert encoder(images(56)).shape == (2, 16, WIDTH)


def test_autocast_decides_the_arithmetic_and_the_result_is_fp32(small):
    encoder = DINOv2(32, 4, pretrained=False)
    x = images(32)
    dtypes = []
    encoder.model.blocks[0].attn.qkv.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = encoder(x)
    fine = encoder(x)
    assert dtypes == [torch.bfloat16, torch.float32]
    assert coarse.dtype == fine.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, atol=0.05, rtol=0)
    assert encoder.bfloat16()(x).dtype == torch.float32


def test_compiles_without_a_graph_break(small):
    encoder = DINOv2(32, 4, registers=True, pretrained=False)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(32)), encoder(images(32)))


# Contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, embed_dim",
    [
        ("dinov2", {"size": "s"}, 384),
        ("dinov2", {"size": "b", "registers": True}, 768),
        ("dinov2", {"size": "g", "registers": True}, 1536),
        ("clip", {}, 1024),
    ],
)
def test_full_sizes_are_made_on_the_meta_device(name, options, embed_dim):
    with torch.device("meta"):
        encoder = registry.encoders.get(name).cls(256, 16, **options)
        assert encoder(torch.empty(2, 3, 256, 256)).shape == (2, 256, embed_dim)
    assert isinstance(encoder, Encoder)
    assert encoder.embed_dim == embed_dim
    assert all(p.is_meta for p in encoder.parameters())


def test_weights_fill_a_module_made_on_the_meta_device(small, tmp_path):
    state = dinov2_state()
    torch.save(state, tmp_path / "dinov2.pth")
    with torch.device("meta"):
        encoder = DINOv2(32, 4, checkpoint=str(tmp_path / "dinov2.pth"))
    encoder.to_empty(device="cpu")
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        tensor.fill_(math.nan)
    encoder.load_weights()
    expected = dinov2_formula(state, images(32), 4)
    torch.testing.assert_close(in_fp64(encoder, images(32)), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_frozen(small, name):
    encoder = registry.encoders.get(name).cls(32, 4, pretrained=False)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.train() is encoder
    assert not any(module.training for module in encoder.modules())
    assert not encoder(images(32).requires_grad_()).requires_grad


def test_random_weights_need_no_file(small, offline):
    encoder = DINOv2(32, 4, pretrained=False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.load_weights()
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "model, expected", [("vit_nothing", "Unknown model"), ("swin_tiny_patch4_window7_224", "no vision transformer")]
)
def test_models_that_cannot_serve_are_named(model, expected):
    with torch.device("meta"), pytest.raises(ValueError, match=expected) as error:
        TimmEncoder(model, 4)
    assert f"'{model}'" in str(error.value)


# Weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("registers", [False, True])
def test_positions_of_another_grid_are_resampled_by_timm(small, tmp_path, suffix, registers):
    name = f"vit_base_patch14_{'reg4_' if registers else ''}dinov2"
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()  # 518 px: 37 x 37
    path = tmp_path / f"timm.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    encoder = DINOv2(256, 16, registers=registers, checkpoint=str(path))
    encoder.load_weights()
    prefix = 0 if registers else 1  # with registers, timm keeps the class token's position in the token
    expected = resample_abs_pos_embed(state["pos_embed"], [16, 16], [37, 37], num_prefix_tokens=prefix)
    loaded = encoder.model.state_dict()
    assert torch.equal(loaded.pop("pos_embed"), expected)
    assert state["pos_embed"].shape[1] == 37 * 37 + prefix
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_a_classifier_in_the_file_is_left_out(small, tmp_path):
    state = timm.create_model("vit_large_patch14_clip_quickgelu_224", pretrained=False, num_classes=32).state_dict()
    assert {"head.weight", "head.bias"} <= set(state)
    save_file(state, tmp_path / "clip.safetensors")
    encoder = CLIP(256, 16, checkpoint=str(tmp_path / "clip.safetensors"))
    encoder.load_weights()
    loaded = encoder.model.state_dict()
    assert set(state) - set(loaded) == {"head.weight", "head.bias"}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.parametrize(
    "state, named",
    [
        (lambda: dinov2_state(registers=True), ["unexpected", "register_tokens", "pos_embed"]),
        (lambda: clip_state(), ["missing", "blocks.0.ls1.gamma", "unexpected", "norm_pre.weight"]),
        (lambda: {"encoder.conv_in.weight": torch.zeros(4)}, ["missing", "cls_token", "encoder.conv_in.weight"]),
        (
            lambda: dinov2_state() | {"norm.weight": torch.zeros(WIDTH + 1)},
            ["shape", f"norm.weight: file ({WIDTH + 1},), expected ({WIDTH},)"],
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_keys(small, tmp_path, state, named):
    path = tmp_path / "other.pt"
    torch.save(state(), path)
    encoder = DINOv2(256, 16, checkpoint=str(path))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        encoder.load_weights()
    for text in ["encoder dinov2", str(path), *named]:
        assert text in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_a_missing_file_is_named(small):
    with pytest.raises(WeightsError, match=r"encoder clip: checkpoint 'nowhere\.pt' does not exist"):
        CLIP(32, 4, checkpoint="nowhere.pt").load_weights()


@pytest.mark.parametrize(
    "name, options, repository",
    [
        ("dinov2", {}, "timm/vit_base_patch14_dinov2.lvd142m"),
        ("dinov2", {"size": "s", "registers": True}, "timm/vit_small_patch14_reg4_dinov2.lvd142m"),
        ("clip", {}, "timm/vit_large_patch14_clip_224.openai"),
    ],
)
def test_offline_the_message_says_both_ways(small, offline, name, options, repository):
    with pytest.raises(WeightsError) as error:
        registry.encoders.get(name).cls(32, 4, **options).load_weights()
    message = str(error.value)
    assert f"encoder {name}" in message
    assert "network access" in message and "HF_HOME" in message
    assert f'[encoders.{name}] checkpoint = "FILE"' in message
    assert f"model.safetensors of the Hugging Face repository {repository}" in message


def test_a_dead_network_is_asked_once(small, offline, monkeypatch):
    def dead(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", dead)
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"ConnectionError: no route"):
        DINOv2(32, 4).load_weights()
    assert time.monotonic() - started < 5


def test_a_filled_cache_is_enough_offline(small, offline):
    repository = offline / "models--timm--vit_base_patch14_dinov2.lvd142m"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    state = dinov2_state()
    save_file(state, repository / "snapshots" / revision / "model.safetensors")
    encoder = DINOv2(32, 4)
    encoder.load_weights()
    expected = dinov2_formula(state, images(32), 4)
    torch.testing.assert_close(in_fp64(encoder, images(32)), expected, atol=5e-6, rtol=0)
