"""Alignment encoders: arithmetic against plain formulas, weights, and the errors for missing weights.

Checkpoints hold seeded random weights under the original authors' key names, at reduced width and depth. The formulas
read the same file, so conversion and arithmetic are checked together.
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
from components.files.weights import WeightsError
from components.nn.timm_encoder import TimmEncoder
from plugins.encoders.clip import CLIP
from plugins.encoders.dinov2 import DINOv2
from tests.support.encoder_formulas import (
    DEPTH,
    HEADS,
    IMAGENET,
    OPENAI,
    WIDTH,
    clip_formula,
    clip_state,
    constants,
    dinov2_formula,
    dinov2_state,
    images,
    in_fp64,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Make timm's named architectures narrow and shallow."""
    make = functools.partial(timm.create_model, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    monkeypatch.setattr(timm, "create_model", make)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Emulate HF_HUB_OFFLINE=1 with an empty cache; return the cache folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


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
    # fp32 places bicubic samples to 1e-5 pixels, which is visible on white noise.
    torch.testing.assert_close(encoder(x).double(), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(in_fp64(encoder, x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("resolution, grid", [(32, 4), (128, 8), (256, 16), (512, 32)])
def test_clip_equals_its_formula(small, tmp_path, resolution, grid):
    state = clip_state()
    torch.save(state, tmp_path / "clip.pt")
    encoder = CLIP(resolution, grid, checkpoint=str(tmp_path / "clip.pt"))
    encoder.load_weights()
    x = images(resolution, batch=1 if grid > 16 else 2)
    expected = clip_formula(state, x, grid)
    assert expected.shape == (len(x), grid * grid, WIDTH)
    torch.testing.assert_close(in_fp64(encoder, x), expected, atol=1e-10, rtol=0)


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
    torch.testing.assert_close(in_fp64(encoder, images(32)), expected, atol=1e-10, rtol=0)


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
    "model, expected",
    [
        ("vit_nothing", "Unknown model"),
        ("hiera_tiny_224.mae", "returns no features of layer -1 for images of 224 pixels, with its final norm"),
    ],
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
    torch.testing.assert_close(in_fp64(encoder, images(32)), expected, atol=1e-10, rtol=0)
