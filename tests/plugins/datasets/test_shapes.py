"""The shapes dataset: the same pictures everywhere, no image in two splits, and a classifier that separates them."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from components import contracts
from plugins.datasets import shapes
from plugins.datasets.shapes import Shapes

SPLITS = ("train", "heldout", "judge")


def digest(data, indices=range(20)) -> str:
    return hashlib.sha256(b"".join(data[i].image.numpy().tobytes() for i in indices)).hexdigest()[:16]


def as_input(data, indices):
    return torch.stack([data[i].image for i in indices]).float() / 127.5 - 1


def test_keeps_the_dataset_contract():
    data = Shapes(32, size=30)
    assert isinstance(data, contracts.Dataset)
    sample = data[3]
    assert sample.image.shape == (3, 32, 32) and sample.image.dtype == torch.uint8 and sample.unreadable is None
    assert data.num_classes == len(data.class_names) == len(set(data.class_names)) == 10
    assert len(data) == 30 and data.flip is False and Shapes(32, flip=True).flip is True


@pytest.mark.parametrize(
    ("resolution", "options", "expected"),
    [
        (32, {}, "c067f7c60bfd1604"),
        (32, {"split": "heldout"}, "8b36b23f2a02f0e8"),
        (32, {"seed": 7}, "480ef9e9b8ac1b42"),
        (64, {}, "64e8e219a6c06a2e"),
    ],
)
def test_pictures_equal_the_recorded_ones(resolution, options, expected):
    assert digest(Shapes(resolution, **options)) == expected


def test_variety_moves_shapes_towards_the_center_and_keeps_their_class():
    """At 0 all masks of a class are equal; the classifier, trained at 1, recognizes all values in between."""
    still = Shapes(32, variety=0.0)
    assert torch.equal(still.mask(3), still.mask(13)) and not torch.equal(still.mask(3), still.mask(4))
    assert not torch.equal(still[3].image, still[13].image)  # colors still vary
    some = Shapes(32, variety=0.3, split="heldout")
    assert (some.judge(as_input(some, range(200))) == torch.arange(200) % 10).float().mean() >= 0.97


def test_an_image_depends_on_nothing_but_its_index():
    data = Shapes(32)
    forwards = [data[i].image for i in range(20)]
    shorter = Shapes(32, size=20)
    for i in reversed(range(20)):
        assert torch.equal(shorter[i].image, forwards[i])


def test_splits_and_seeds_share_no_image():
    streams = [Shapes(32, size=300, split=split, seed=seed) for split in SPLITS for seed in (0, 1)]
    pictures = {data[i].image.numpy().tobytes() for data in streams for i in range(300)}
    assert len(pictures) == 6 * 300


def test_the_same_scene_at_every_resolution():
    coarse, fine = Shapes(32), Shapes(128)
    for i in range(50):
        pooled = F.avg_pool2d(fine[i].image.float(), 4)
        assert (pooled - coarse[i].image.float()).abs().mean() < 1.5
        assert (pooled - coarse[i + 10].image.float()).abs().mean() > 10


def test_classes_are_balanced():
    labels = [sample.label for sample in (Shapes(16, size=200)[i] for i in range(200))]
    assert torch.bincount(torch.tensor(labels), minlength=10).tolist() == [20] * 10


def test_shapes_are_visible_and_inside_the_picture():
    data = Shapes(32)
    luma = torch.tensor(shapes.LUMA)[:, None, None]
    for i in range(200):
        mask, brightness = data.mask(i), (data[i].image * luma).sum(0)
        inside, outside = brightness[mask == 1], brightness[mask == 0]
        gap = max(inside.min() - outside.max(), outside.min() - inside.max())
        assert gap > 0.19 * 255
        assert mask.mean() > 0.05
        border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.max() < 0.6


def test_indices_outside_are_refused_and_negative_ones_count_from_the_end():
    data = Shapes(16, size=12)
    assert torch.equal(data[-1].image, data[11].image) and data[-1].label == data[11].label == 1
    assert sum(1 for _ in data) == 12
    with pytest.raises(IndexError, match="index 12 is outside its 12 images"):
        data[12]


@pytest.mark.parametrize(
    ("resolution", "options", "message"),
    [
        (15, {}, "resolution = 15 is not allowed; it must be at least 16"),
        (32, {"size": 9}, "size = 9 is not allowed; it must be at least 10"),
        (32, {"seed": -1}, "seed = -1 is not allowed; it must be at least 0"),
        (32, {"split": "test"}, "split = 'test' is not allowed; it must be one of train, heldout, judge"),
        (32, {"variety": 1.5}, "variety = 1.5 is not allowed; it must be between 0 and 1"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(resolution, options, message):
    with pytest.raises(ValueError, match=message):
        Shapes(resolution, **options)


@pytest.mark.parametrize("resolution", [32, 64])
def test_judge_names_held_out_images(resolution):
    data = Shapes(resolution, split="heldout")
    predicted = data.judge(as_input(data, range(400)))
    assert predicted.dtype == torch.int64 and not predicted.requires_grad
    assert (predicted == torch.arange(400) % 10).float().mean() >= 0.97


def test_judge_forgives_blur_and_is_fooled_by_no_shape():
    data = Shapes(32, split="heldout")
    sharp = as_input(data, range(200))
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    assert (data.judge(blurred) == torch.arange(200) % 10).float().mean() >= 0.95
    gradients = F.interpolate(torch.rand(200, 3, 2, 2) * 2 - 1, (32, 32), mode="bilinear", align_corners=True)
    assert (data.judge(gradients) == torch.arange(200) % 10).float().mean() < 0.25


def test_loading_the_judge_draws_no_random_numbers():
    shapes._load_judge.cache_clear()
    before = torch.get_rng_state()
    Shapes(32).judge(torch.zeros(1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


def test_judge_is_small():
    assert Path(shapes.__file__).with_name("shapes_judge.safetensors").stat().st_size <= 300 * 1024


def test_without_labels_the_images_are_the_same_and_of_one_class():
    labeled, plain = (Shapes(32, size=30, labels=labels) for labels in (True, False))
    assert all(torch.equal(labeled[i].image, plain[i].image) and plain[i].label == 0 for i in range(30))
    assert plain.num_classes == 1 and plain.class_names == ("shape",) and plain.class_counts() == [30]
    assert labeled.has_judge and not plain.has_judge and plain.judge_dim == labeled.judge_dim
