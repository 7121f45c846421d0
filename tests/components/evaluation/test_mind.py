"""MIND against optimal transport by brute force, against torch-fidelity's arithmetic in NumPy, and a closed form."""

import itertools

import numpy as np
import pytest
import torch

from components.diffusion.random_numbers import generator
from components.evaluation import EvaluationError
from components.evaluation.mind import monge_inception_distance


def features(count: int, dim: int, name: str, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=generator(name)) + offset


def directions(projections: int, dim: int, g: torch.Generator) -> np.ndarray:
    found = torch.randn(projections, dim, generator=g)
    return (found / found.norm(dim=1, keepdim=True)).double().numpy()


def test_each_projection_is_transported_at_the_least_cost():
    """Sorting is one way to find the best of all n! assignments."""
    a, b = features(6, 4, "a"), features(6, 4, "b", 0.3)
    costs = []
    for u in directions(20, 4, torch.Generator().manual_seed(2020)):
        x, y = a.double().numpy() @ u, b.double().numpy() @ u
        costs.append(min(((x - y[list(order)]) ** 2).mean() for order in itertools.permutations(range(6))))
    assert monge_inception_distance(a, b, projections=20) == pytest.approx(3 * 4 * np.mean(costs), rel=1e-5)


@pytest.mark.parametrize(
    ("samples", "reference", "images"), [(90, 90, 0), (120, 90, 0), (90, 120, 5000), (120, 150, 40)]
)
def test_subsets_and_value_are_those_of_torch_fidelity(samples, reference, images):
    a, b = features(samples, 16, "a"), features(reference, 16, "b", 0.5)
    n, g = min(samples, reference, images or 10**9), torch.Generator().manual_seed(7)
    x, y = (side[torch.randperm(len(side), generator=g)[:n]] if len(side) > n else side for side in (a, b))
    u = directions(130, 16, g)
    px, py = (np.sort(side.double().numpy() @ u.T, axis=0) for side in (x, y))
    expected = 3 * 16 * ((px - py) ** 2).mean()
    found = monge_inception_distance(a, b, images=images, projections=130, seed=7)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_shift_costs_three_times_its_square():
    """E (u s)^2 = |s|^2 / D over random unit vectors u."""
    x = features(50, 32, "x")
    assert monge_inception_distance(x, x.clone()) == 0
    assert monge_inception_distance(x, x + 2.0, projections=4000) == pytest.approx(3 * 4 * 32, rel=0.05)


def test_features_of_two_networks_are_refused():
    with pytest.raises(EvaluationError, match=r"one network .* \(5, 3\) and \(5, 4\)"):
        monge_inception_distance(torch.ones(5, 3), torch.ones(5, 4))
    with pytest.raises(EvaluationError, match="at least one image"):
        monge_inception_distance(torch.ones(0, 3), torch.ones(5, 3))
