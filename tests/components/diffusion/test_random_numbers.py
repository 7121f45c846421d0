"""A step's random numbers are a function of (seed, step, position), the same for any split over ranks."""

import pytest
import torch

from components.contracts import Distribution, LatentShape, Modules, RandomNumbers
from components.diffusion.random_numbers import draw, generator
from plugins.recipes.rae_decoder import RaeDecoder
from plugins.recipes.repae import RepaE
from tests.support.toys import LATENT, NUMBERS

DECLARED = NUMBERS | {"vector": Distribution("normal", (64,))}


def whole(seed: int = 0, step: int = 0) -> RandomNumbers:
    return draw(seed, step, range(8), 8, DECLARED)


def test_the_same_key_gives_the_same_numbers():
    first, second = whole(), whole()
    assert first.keys() == DECLARED.keys()
    assert all(torch.equal(numbers, second[name]) for name, numbers in first.items())


def test_every_step_seed_sample_and_name_has_its_own():
    base = whole()
    for other in (whole(step=1), whole(seed=1), whole(step=-1)):
        assert not any(torch.equal(numbers, other[name]) for name, numbers in base.items())
    assert not torch.equal(base["posterior"], base["noise"]) and not torch.equal(base["time"], base["label"])
    for numbers in base.values():
        assert len({tuple(row.flatten().tolist()) for row in numbers}) == 8


def test_ranks_and_micro_batches_take_slices_of_the_global_batch():
    parts = [draw(0, 3, range(first, first + 2), 8, DECLARED) for first in (0, 2, 4, 6)]
    for name, numbers in whole(step=3).items():
        assert torch.equal(torch.cat([part[name] for part in parts]), numbers)


def test_distributions():
    d = draw(0, 0, range(4096), 4096, DECLARED)
    for normal in (d["posterior"], d["noise"], d["vector"]):
        assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    for uniform in (d["time"], d["label"]):
        assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


@pytest.mark.parametrize("recipe", [RepaE, RaeDecoder])
def test_the_keys_of_earlier_versions_give_the_same_numbers(recipe):
    """Recorded numbers and interrupted runs depend on the keys, which are not the names in every recipe."""
    shapes = {"posterior": LATENT, "noise": LATENT, "time": (), "label": ()}
    names = {"noise": "posterior", "sigma": "time"} if recipe is RaeDecoder else dict(zip(shapes, shapes))
    found = draw(7, 3, range(2, 6), 8, recipe().random_numbers(Modules(), LatentShape(*LATENT)))
    assert found.keys() == names.keys()
    for name, key in names.items():
        sample = torch.randn if shapes[key] else torch.rand
        assert torch.equal(found[name], sample(8, *shapes[key], generator=generator(7, 3, key))[2:6])
