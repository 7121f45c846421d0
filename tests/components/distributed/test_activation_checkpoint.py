"""Activation checkpointing: passes without gradients run the units as they are."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from components.contracts import Network
from components.distributed.activation_checkpoint import Recompute, apply_recompute


class Net(Network):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def units(self):
        return [self.first, self.second]

    def forward(self, x):
        return self.second(self.first(x).sin())


@pytest.mark.parametrize("mode", ["full", "selective", "every 2"])
def test_forward_mode_derivatives_pass_checkpointed_units(mode):
    net, x, dx = Net(), torch.randn(2, 3), torch.randn(2, 3)

    def derivative():
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(net(forward_ad.make_dual(x, dx))).tangent

    expected = derivative()
    apply_recompute(net, Recompute.parse(mode))
    assert torch.equal(derivative(), expected)
