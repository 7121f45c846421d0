"""LPIPS against torchmetrics' implementation, and the files its weights come from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg

from components.contracts import Posterior, ReconstructionLoss
from components.files.weights import WeightsError
from plugins.losses.lpips import LPIPS

POSTERIOR = Posterior(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def torchvision_features() -> nn.Sequential:
    """torchvision's VGG16 convolutions, with seeded weights that keep the activations' scale."""
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv in features:
            if isinstance(conv, nn.Conv2d):
                conv.weight.normal_(0, math.sqrt(2 / (9 * conv.in_channels)), generator=g)
                conv.bias.normal_(0, 0.1, generator=g)
    return features


@pytest.fixture(scope="module")
def vgg_file(torchvision_features, tmp_path_factory) -> str:
    """A file like vgg16-397923af.pth: with a classifier, which LPIPS does not use."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{key}": value for key, value in torchvision_features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(3, 3)}, path)
    return str(path)


@pytest.fixture(scope="module")
def unit(vgg_file) -> LPIPS:
    loss = LPIPS(input_range="unit", vgg_checkpoint=vgg_file)
    loss.load_weights()
    return loss.double()


def images(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.rand(2, 3, 32, 32, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return x.to(dtype), (0.7 * x + 0.3 * noise).to(dtype)


def test_matches_torchmetrics(unit, torchvision_features, monkeypatch):
    from torchmetrics.functional.image import lpips as reference

    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: torchvision_features)
    net = reference._NoTrainLpips(net="vgg", pnet_rand=True).double()
    x, x_hat = images()
    a, b = x_hat.clone().requires_grad_(), x_hat.clone().requires_grad_()
    ours, theirs = unit(x, a, POSTERIOR), net(x, b).mean()
    assert theirs > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


def test_published_range_shows_lpips_twice_the_image_less_one(unit, vgg_file):
    assert LPIPS().input_range == "unit"
    loss = LPIPS(input_range="published", vgg_checkpoint=vgg_file)
    loss.load_weights()
    x, x_hat = images()
    published = loss.double()(x, x_hat, POSTERIOR)
    torch.testing.assert_close(published, unit(2 * x - 1, 2 * x_hat - 1, POSTERIOR), rtol=1e-12, atol=0)
    assert abs(published - unit(x, x_hat, POSTERIOR)) > 1e-3


def test_only_the_reconstruction_gets_gradients(unit):
    x, x_hat = (image.requires_grad_() for image in images())
    unit(x, x_hat, POSTERIOR).backward()
    assert x_hat.grad.abs().sum() > 0
    assert x.grad is None
    assert not unit.training and all(p.grad is None and not p.requires_grad for p in unit.parameters())


def test_features_that_are_all_zero_give_zero_gradient():
    loss = LPIPS()
    with torch.no_grad():
        for p in loss.features.parameters():
            p.fill_(-1e-3)
        loss.features[0].weight.zero_()  # every ReLU outputs zero
    x, x_hat = images(torch.float32)
    x_hat.requires_grad_()
    value = loss(x, x_hat, POSTERIOR)
    value.backward()
    assert value == 0 and torch.equal(x_hat.grad, torch.zeros_like(x_hat))


def test_autocast_and_bf16_are_computed_in_fp32(unit, vgg_file):
    loss = LPIPS(input_range="unit", vgg_checkpoint=vgg_file)
    loss.load_weights()
    x, x_hat = images(torch.bfloat16)
    expected = loss(x.float(), x_hat.float(), POSTERIOR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, x_hat, POSTERIOR)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert unit(*images(), POSTERIOR).dtype == torch.float64


def test_convolutions_follow_the_run_only_where_asked(vgg_file):
    """precision = "run": VGG16 in autocast's dtype, all else in fp32; outside autocast the same numbers as fp32."""

    def value_and_gradient(loss, x, x_hat, autocast):
        x_hat = x_hat.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(x, x_hat, POSTERIOR)
        return value.detach(), torch.autograd.grad(value, x_hat)[0]

    exact, rounded = (LPIPS(vgg_checkpoint=vgg_file, precision=precision) for precision in ("fp32", "run"))
    exact.load_weights()
    rounded.load_weights()
    x, x_hat = images(torch.float32)
    seen = []
    handles = [layer.register_forward_hook(lambda m, inputs, y: seen.append(y.dtype))
               for layer in (*rounded.features, *rounded.linear)]  # fmt: skip
    value, gradient = value_and_gradient(rounded, x, x_hat, autocast=True)
    layers = len(rounded.features)
    assert seen == [torch.bfloat16] * 2 * layers + [torch.float32] * len(rounded.linear)
    for handle in handles:
        handle.remove()
    expected, expected_gradient = value_and_gradient(exact, x, x_hat, autocast=True)
    assert value.dtype == gradient.dtype == torch.float32
    assert 0 < abs(value / expected - 1) < 0.02
    assert torch.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.95
    for got, same in zip(value_and_gradient(rounded, x, x_hat, autocast=False), (expected, expected_gradient)):
        assert torch.equal(got, same)
    compiled = torch.compile(rounded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, x, x_hat, autocast=True)[0], value, rtol=1e-2, atol=0)


def test_the_image_itself_gets_no_graph(unit):
    x, x_hat = (image.requires_grad_() for image in images())
    graphs = []
    handle = unit.features[0].register_forward_hook(lambda m, inputs, y: graphs.append(y.requires_grad))
    unit(x, x_hat, POSTERIOR).backward()
    handle.remove()
    assert graphs == [False, True] and x.grad is None


def test_timm_layout_and_short_linear_names(unit, torchvision_features, tmp_path):
    state = {f"features.{key}": value for key, value in torchvision_features.state_dict().items()}
    unused = {"pre_logits.fc1.weight": torch.zeros(2, 2), "head.fc.bias": torch.zeros(2)}
    save_file(state | unused, tmp_path / "timm.safetensors")
    torch.save({f"lin{i}.weight": conv.weight for i, conv in enumerate(unit.linear)}, tmp_path / "linear.pth")
    loss = LPIPS(vgg_checkpoint=f"{tmp_path}/timm.safetensors", linear_checkpoint=f"{tmp_path}/linear.pth")
    loss.load_weights()
    expected = unit.state_dict()
    assert {"features.0.weight", "features.28.bias", "linear.0.weight", "linear.4.weight"} < set(expected)
    assert all(torch.equal(value.double(), expected[key]) for key, value in loss.state_dict().items())


def test_weights_that_came_through_the_meta_device(unit, vgg_file):
    with torch.device("meta"):
        loss = LPIPS(input_range="unit", vgg_checkpoint=vgg_file)
    loss.to_empty(device="cpu")
    loss.load_weights()
    x, x_hat = images()
    torch.testing.assert_close(loss.double()(x, x_hat, POSTERIOR), unit(x, x_hat, POSTERIOR))


def test_without_network_the_message_names_the_option(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"\[losses.lpips\] vgg_checkpoint") as error:
        LPIPS().load_weights()
    assert "vgg16-397923af.pth" in str(error.value) and "network" in str(error.value)


def test_hub_cache_is_read_without_network(unit, torchvision_features, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--timm--vgg16.tv_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--timm--vgg16.tv_in1k" / "refs").mkdir()
    (tmp_path / "models--timm--vgg16.tv_in1k" / "refs" / "main").write_text("0" * 40)
    state = {f"features.{key}": value for key, value in torchvision_features.state_dict().items()}
    save_file(state, snapshot / "model.safetensors")
    loss = LPIPS()
    loss.load_weights()
    assert torch.equal(loss.features[28].weight, torchvision_features[28].weight)


def test_wrong_files_are_refused(vgg_file, tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"vgg_checkpoint.*part.pth(.|\n)*missing"):
        LPIPS(vgg_checkpoint=f"{tmp_path}/part.pth").load_weights()
    with pytest.raises(WeightsError, match=r"linear_checkpoint.*(.|\n)*unexpected"):
        LPIPS(vgg_checkpoint=vgg_file, linear_checkpoint=vgg_file).load_weights()


def test_shipped_linear_weights_are_the_published_ones(unit):
    from torchmetrics.functional.image import lpips as reference

    published = Path(reference.__file__).parent / "lpips_models" / "vgg.pth"
    state = torch.load(published, map_location="cpu", weights_only=True)
    assert len(state) == len(unit.linear)
    assert all(torch.equal(state[f"lin{k}.model.1.weight"].double(), conv.weight) for k, conv in enumerate(unit.linear))


def test_contract_and_smallest_image():
    loss = LPIPS(weight=0.5)
    assert isinstance(loss, ReconstructionLoss) and loss.weight == 0.5
    small = torch.zeros(1, 3, 16, 15)
    with pytest.raises(ValueError, match="16 px"):
        loss(small, small, POSTERIOR)
    assert torch.isfinite(loss(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16), POSTERIOR))


def test_compiles_whole(unit):
    x, x_hat = images()
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x_hat, POSTERIOR), unit(x, x_hat, POSTERIOR))
