"""Latent statistics: the paper's spatial variance, and colors that show the latents' structure."""

import pytest
import torch

from components.diffusion.random_numbers import generator
from components.monitor.hardware import GPU_TFLOPS, peak_tflops
from components.monitor.latent_statistics import observe, observed, principal_components, statistics
from components.nn.latent_norm import LatentNorm
from components.registry import discover
from tests.support import toys
from tests.trainer.run.test_step import make_step

discover("plugins")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator("latents", seed), dtype=torch.float64)


def test_spatial_variance_is_over_positions_of_each_image_and_channel():
    z = random(3, 4, 5, 6)
    by_hand = [sum((v - sum(row) / len(row)) ** 2 for v in row) / len(row) for row in z.reshape(12, 30).tolist()]
    assert statistics(z)["spatial_variance"].item() == pytest.approx(sum(by_hand) / len(by_hand))
    shifted = z + 7 * random(3, 4, 1, 1, seed=1)
    assert statistics(shifted)["spatial_variance"].item() == pytest.approx(sum(by_hand) / len(by_hand))
    assert statistics(shifted)["mean"].item() == pytest.approx(shifted.mean().item())


def test_latents_that_are_flat_within_each_image_have_none():
    flat = random(8, 4, 1, 1).expand(8, 4, 6, 6)
    found = {name: value.item() for name, value in statistics(flat).items()}
    assert found["spatial_variance"] == pytest.approx(0, abs=1e-12) and found["total_variation"] == 0


def test_total_variation_of_a_ramp():
    ramp = torch.arange(6.0).expand(1, 1, 4, 6)
    assert statistics(ramp)["total_variation"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e", "ldm", "repa", "tokenizer", "rae_decoder"])
def test_every_recipe_shows_its_latents_without_being_changed(recipe):
    m = toys.modules()
    shown = []
    sample, encode = LatentNorm.forward, m.tokenizer.encode
    m.tokenizer.encode = lambda x: shown.append(encode(x).mean) or encode(x)
    values = make_step(m, recipe, 1)(0, [toys.batch()]).read()
    assert LatentNorm.forward is sample
    # The means differ from samples only by the noise, which is small here.
    expected = statistics(shown[0])["mean"].item()
    assert values["latent/mean"] == pytest.approx(expected, abs=0.1)
    assert values["latent/spatial_variance"] > 0 and values["latent/total_variation"] > 0


def test_micro_batches_count_alike():
    values = [make_step(toys.modules(), "ldm", n)(0, [toys.batch(k) for k in range(n)]).read() for n in (1, 2)]
    second = make_step(toys.modules(), "ldm", 1)(0, [toys.batch(1)]).read()
    for name in ("latent/mean", "latent/spatial_variance", "latent/total_variation"):
        assert values[1][name] == pytest.approx((values[0][name] + second[name]) / 2)


def test_statistics_of_the_latent_norm():
    norm = LatentNorm(3)
    norm.running_mean.copy_(torch.tensor([1.0, -4.0, 0.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 7.0]))
    found = {name: value.item() for name, value in norm.summary().items()}
    assert found == {"mean": -1, "mean_abs_max": 4, "variance_mean": 4, "variance_min": 1, "variance_max": 7}


def test_only_the_first_latents_of_a_micro_batch_are_collected():
    with observed() as seen:
        observe(random(1, 2, 3, 3).requires_grad_())
        observe(random(1, 2, 3, 3, seed=1))
    observe(random(1, 2, 3, 3, seed=2))
    assert len(seen) == 1 and torch.equal(seen[0], random(1, 2, 3, 3)) and not seen[0].requires_grad


@pytest.mark.parametrize("update", [True, False, None])
def test_the_latent_norm_shows_what_it_normalizes(update):
    z, norm = random(2, 3, 4, 4), LatentNorm(3).double()
    with observed() as seen:
        norm(z) if update is None else norm.batch(z, update)
    assert torch.equal(seen[0], z)


def skewed(channels: int = 6) -> torch.Tensor:
    """Components of clearly different variance, each skewed."""
    scale = 3.0 ** -torch.arange(channels, dtype=torch.float64)
    return random(4, channels, 8, 8).exp() * scale[:, None, None]


def test_colors_do_not_depend_on_a_rotation_of_the_channels():
    z = skewed()
    rotation, _ = torch.linalg.qr(random(6, 6, seed=2))
    rotated = torch.einsum("dc,bchw->bdhw", rotation, z) + 5
    assert torch.allclose(principal_components(z), principal_components(rotated), atol=1e-5)


def test_colors_are_the_components_in_order():
    """Independent channels of very different scale are the components themselves."""
    z = skewed(4)[:, [2, 0, 3, 1]]
    colors = principal_components(z)
    assert colors.shape == (4, 3, 8, 8) and colors.min() == 0 and colors.max() == 1
    for color, channel in enumerate([1, 3, 0]):
        pair = torch.stack([colors[:, color].flatten().double(), z[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels_leave_gray(channels):
    colors = principal_components(random(2, channels, 4, 4))
    assert (colors[:, channels:] == 0.5).all() and colors[:, :channels].std() > 0.1


def test_flat_latents_are_gray_and_finite():
    assert (principal_components(torch.ones(2, 4, 3, 3)) == 0.5).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_peak_of_a_gpu_by_the_name_that_torch_gives(name, expected):
    assert peak_tflops(name) == expected
    if expected in (989, 312, 362, 2250, 165, 71):  # as `check --gpu` reports
        assert expected in GPU_TFLOPS.values()
