"""Functions of whole matrices on any number of ranks: one rank computes each matrix, of which it has all rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from components.distributed.parallel import Sharding, local, make_mesh, shard
from components.optim.whole_matrices import on_whole_matrices
from tests.support.ranks import run_ranks
from tests.support.runs import whole

pytestmark = pytest.mark.long

SHAPES = [(5, 3), (2, 7), (8, 8), (1, 4), (8, 8), (3, 2), (9, 4)]  # on 3 or 4 ranks, some hold no rows


def mixed(matrix: torch.Tensor) -> torch.Tensor:
    """Depends on all rows; tall results are transposed views, as those of Newton-Schulz iterations."""
    return (matrix.T @ matrix @ matrix.T).T


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterList([torch.randn(*shape, dtype=torch.float64) for shape in SHAPES])


def computed(rank: int, world: int, mesh: tuple[int, int]) -> tuple[list[torch.Tensor], int]:
    module, calls = layers(), []
    shard(module, Sharding(make_mesh("cpu", mesh)))
    parameters = list(module.parameters())

    def function(matrix):
        calls.append(matrix)
        return mixed(matrix)

    rows = on_whole_matrices(function, [local(p).detach() for p in parameters], parameters)
    with torch.no_grad():
        for p, found in zip(parameters, rows):
            local(p).copy_(found)
    return [whole(p) for p in parameters], len(calls)


@pytest.mark.parametrize("mesh", [(1, 3), (1, 4), (2, 2), (3, 1)])
def test_results_are_those_of_whole_matrices_and_ranks_share_the_work(mesh):
    expected = [mixed(p.detach()) for p in layers().parameters()]
    found = run_ranks(computed, mesh[0] * mesh[1], mesh)
    for values, _ in found:
        assert all(torch.equal(a, b) for a, b in zip(values, expected))
    counts = [count for _, count in found]
    assert sum(counts) == len(SHAPES) and max(counts) - min(counts) <= 1
