"""Contract, training and behavior of template."""

from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.plugin_kit.conformance import checks, resolve

HERE = Path(__file__).resolve().parent
CASE = resolve("plugins", f"{HERE / 'template.py'}:template")
CHECKS = checks(CASE)


@pytest.mark.parametrize("name", CHECKS)
def test_conforms(name):
    CHECKS[name].run()


def test_trains(tmp_path):
    options = [f"--run.dir={tmp_path / 'run'}", "--training.steps=2", "--sampling.images=2", "--sampling.steps=2"]
    assert main(["train", str(HERE / "template.toml"), *options]) == 0


def test_encoder_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    encoder = CASE.make()
    black, white = encoder(torch.stack([-torch.ones(3, 32, 32), torch.ones(3, 32, 32)]))
    assert not torch.equal(black, white)


def test_tokenizer_behavior():
    """Replace this with a test of what the plugin is for."""
    tokenizer = CASE.make()
    assert tokenizer.factor == 4 and tokenizer.channels == 4


def test_denoiser_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    from components.contracts import Condition

    denoiser, condition = CASE.make(), Condition(torch.arange(2))
    late, early = (denoiser(torch.ones(2, 4, 8, 8), torch.full((2,), t), condition).velocity for t in (1.0, 0.0))
    assert not torch.equal(late, early)


def test_reconstruction_loss_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    loss, x = CASE.make(), torch.rand(2, 3, 32, 32)
    assert loss(x, x, None) == pytest.approx(0, abs=1e-6)
    assert loss(x, x + 0.5, None) == pytest.approx(0.5, abs=1e-2)  # far from zero, the absolute error


def test_adversarial_loss_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    loss, x = CASE.make(), torch.rand(2, 3, 32, 32)
    hinge = loss.discriminator(x, x, 0)[0]["hinge"]
    assert hinge >= 2 - 1e-6  # no discriminator can tell two equal batches apart


def test_alignment_loss_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    loss, x = CASE.make(), torch.rand(2, 16, 24)
    assert loss.align([3 * x + 1], [x]) < 1e-6  # scale and shift of a token do not matter


def test_dataset_behavior():
    """Replace this with a test of what the plugin is for."""
    data = CASE.make()
    across, down = data[0].image, data[1].image
    assert (across == across[:, :1]).all() and (down == down[:, :, :1]).all()


def test_recipe_behavior():
    """Replace this with a test of what the plugin is for."""
    assert CASE.make().trains == {"denoiser": ("denoiser",)}


def test_optimizer_behavior():
    """Replace this with a test of what the plugin is for."""
    import torch

    layer = torch.nn.Linear(4, 4)
    optimizer, before = CASE.make(modules=torch.nn.ModuleDict({"layer": layer}), lr=0.5), layer.bias.clone()
    layer.bias.grad = torch.tensor([3.0, -0.1, 0.0, 2.0])
    optimizer.step()
    assert torch.allclose(before - layer.bias, torch.tensor([0.5, -0.5, 0.0, 0.5]))
