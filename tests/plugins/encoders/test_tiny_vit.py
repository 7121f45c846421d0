"""Encoder tiny_vit: ships with weights trained on shapes, and returns tokens on any grid."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components import contracts
from components.files.weights import WeightsError
from plugins.datasets.shapes import Shapes
from plugins.encoders import tiny_vit
from plugins.encoders.tiny_vit import TinyViT


def encoder(grid=8, resolution=32, **options):
    module = TinyViT(resolution, grid, **options)
    module.load_weights()
    return module


def heldout(count, resolution=32):
    data = Shapes(resolution, split="heldout")
    samples = [data[i] for i in range(count)]
    images = torch.stack([s.image for s in samples]).float() / 127.5 - 1
    return images, torch.tensor([s.label for s in samples]), torch.stack([data.mask(i) for i in range(count)])


@pytest.mark.parametrize(("grid", "resolution"), [(8, 32), (4, 32), (16, 64), (8, 64), (5, 48)])
def test_tokens_lie_on_the_denoisers_grid(grid, resolution):
    module = encoder(grid, resolution)
    assert isinstance(module, contracts.Encoder)
    images, _, _ = heldout(3, resolution)
    tokens = module(images)
    assert tokens.shape == (3, grid * grid, module.embed_dim)
    assert tokens.isfinite().all()


@pytest.mark.parametrize("resolution", [32, 64])
def test_names_held_out_images(resolution):
    images, labels, _ = heldout(400, resolution)
    assert (encoder(8, resolution).classify(images).argmax(1) == labels).float().mean() >= 0.95


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_tokens_tell_what_is_where(grid):
    """The head, applied to each token alone, finds the tokens covered by the shape, in row-major order."""
    module = encoder(grid)
    images, labels, masks = heldout(200)
    covered = F.adaptive_avg_pool2d(masks[:, None], grid).flatten(1)
    logits = module.head(module(images))
    foreground = 1 - logits.softmax(-1)[..., 0]
    # Correlation over all tokens; shuffled or transposed tokens would have almost none.
    assert torch.corrcoef(torch.stack([foreground.flatten(), covered.flatten()]))[0, 1] > 0.85
    named = logits[..., 1:].argmax(-1) == labels[:, None]
    assert named[covered > 0.9].float().mean() > 0.85


def test_frozen_and_deterministic():
    module = encoder()
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    images = heldout(4)[0].requires_grad_()
    tokens = module(images)
    assert not tokens.requires_grad
    assert torch.equal(tokens, module(images)) and torch.equal(tokens, encoder()(images))
    torch.testing.assert_close(module(images[2:3]), tokens[2:3], rtol=1e-4, atol=1e-4)


def test_built_without_memory_reads_its_weights_later():
    with torch.device("meta"):
        module = TinyViT(32, 8)
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu").load_weights()
    images = heldout(2)[0]
    assert torch.equal(module(images), encoder()(images))
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_other_weights_can_be_named(tmp_path):
    torch.manual_seed(0)
    other = TinyViT(32, 8)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    images = heldout(2)[0]
    assert torch.equal(encoder(checkpoint=str(tmp_path / "other.pt"))(images), other(images))
    with pytest.raises(WeightsError, match=r"encoder tiny_vit: checkpoint .*missing\.pt' does not exist"):
        encoder(checkpoint=str(tmp_path / "missing.pt"))


def test_weights_file_is_small():
    assert Path(tiny_vit.__file__).with_suffix(".safetensors").stat().st_size <= 2 * 2**20
