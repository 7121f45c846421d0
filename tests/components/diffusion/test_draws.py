"""A step's random numbers are a function of (seed, step, position), the same for any split over ranks."""

import torch

from components.contracts import Draws
from components.diffusion.random_numbers import draw
from tests.support.toys import LATENT


def whole(seed: int = 0, step: int = 0) -> Draws:
    return draw(seed, step, range(8), 8, LATENT, extra_dim=6)


def test_the_same_key_gives_the_same_numbers():
    assert all(torch.equal(a, b) for a, b in zip(whole(), whole()))


def test_every_step_seed_sample_and_name_has_its_own():
    base = whole()
    for other in (whole(step=1), whole(seed=1), whole(step=-1)):
        assert not any(torch.equal(a, b) for a, b in zip(base, other))
    assert not torch.equal(base.posterior, base.noise) and not torch.equal(base.time, base.label)
    for numbers in base:
        assert len({tuple(row.flatten().tolist()) for row in numbers}) == 8


def test_ranks_and_micro_batches_take_slices_of_the_global_batch():
    parts = [draw(0, 3, range(first, first + 2), 8, LATENT, extra_dim=6) for first in (0, 2, 4, 6)]
    for name, numbers in whole(step=3)._asdict().items():
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), numbers)


def test_distributions():
    d = draw(0, 0, range(4096), 4096, LATENT, extra_dim=64)
    for normal in (d.posterior, d.noise, d.extra):
        assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    for uniform in (d.time, d.label):
        assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
