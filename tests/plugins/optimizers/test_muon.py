"""Muon against torch.optim.Muon and torch.optim.AdamW, what it trains, and steps that are skipped."""

import copy

import pytest
import torch
from torch import nn

from components.contracts import Network
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from plugins.optimizers.muon import KELLER, POLAR_EXPRESS, Muon, orthogonalized
from tests.support import toys


class Net(Network):
    """An embedding, two hidden matrices (one wide, one tall) with biases, a norm, a convolution, an output layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8))])
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(8, 3)

    def units(self):
        return [*self.blocks, self.conv]


HIDDEN = {"net.blocks.0.0.weight", "net.blocks.0.2.weight"}


def net(dtype=torch.float32) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"net": Net().to(dtype), "heads": nn.ModuleList([nn.Linear(4, 4)])})


def fill(modules: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in modules.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1


def trained_by_muon(optimizer: Muon, modules: nn.Module) -> set[str]:
    names = {p: name for name, p in modules.named_parameters()}
    return {names[p] for group in optimizer.param_groups if "momentum" in group for p in group["params"]}


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    modules = net()
    optimizer = Muon(modules, 1e-3, adamw_lr=1e-4)
    assert trained_by_muon(optimizer, modules) == HIDDEN
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(modules.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    every = trained_by_muon(Muon(modules, 1e-3, matrices="all"), modules)
    assert every == HIDDEN | {"net.embed.weight", "net.out.weight", "heads.0.weight"}
    m = toys.modules()
    named = {p: name for name, p in m.denoiser.named_parameters()}
    muon = Muon(nn.ModuleDict({"denoiser": m.denoiser, "heads": m.heads}), 1e-3)
    assert {named[p].split(".", 2)[2] for p in muon.param_groups[0]["params"]} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight",
    }  # fmt: skip


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "theirs"),
    [("match_adamw", "match_rms_adamw"), ("original", "original"), ("spectral", "spectral_unclamped")],
)
def test_steps_are_those_of_pytorchs_muon_and_adamw(nesterov, scale, theirs):
    """In bf16 and on plain tensors, as PyTorch's Muon computes, bit for bit."""
    ours, other = net(), net()
    options = {"weight_decay": 0.1, "betas": [0.9, 0.95], "adamw_lr": 1e-3}
    optimizer = Muon(ours, 0.02, nesterov=nesterov, scale=scale, precision="bf16", **options)
    named = dict(other.named_parameters())
    if theirs == "spectral_unclamped" and "spectral_unclamped" not in torch.optim.Muon.__doc__:
        pytest.skip("this PyTorch has no such scale")
    muon = torch.optim.Muon(
        [named[name] for name in sorted(HIDDEN)], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs
    )
    rest = [p for name, p in named.items() if name not in HIDDEN]
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(4):
        for modules, optimizers in ((ours, [optimizer]), (other, [muon, adamw])):
            fill(modules, step)
            for each in optimizers:
                each.step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, named[name]), name


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize(("coefficients", "low", "high"), [(KELLER, 0.68, 1.21), (POLAR_EXPRESS, 0.8, 1.15)])
def test_singular_values_become_about_one_and_directions_stay(shape, coefficients, low, high):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, len(s), dtype=torch.float64)) @ v
    found = u.T @ orthogonalized(matrix, coefficients) @ v.T
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-12
    assert low < found.diagonal().min() and found.diagonal().max() < high
    assert not orthogonalized(torch.zeros(shape)).any()


def test_a_skipped_step_leaves_weights_and_state_as_they_are():
    modules = net()
    group = ParameterGroup("g", modules, Muon, schedule=Schedule(0.02))
    for step, finite in enumerate((False, True, False)):  # also before there is any state
        fill(modules, step)
        if not finite:
            for p in modules.parameters():
                p.grad.fill_(torch.nan)
        before = copy.deepcopy((list(modules.parameters()), list(group.optimizer.state.values())))
        group.apply(step, group.norms().norm(), torch.tensor(finite))
        after = list(modules.parameters()), list(group.optimizer.state.values())
        if not finite:
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
            for a, b in zip(before[1] or [{}] * len(after[1]), after[1]):
                assert all(torch.equal(a.get(k, torch.zeros_like(v)), v) for k, v in b.items())
    assert all(value.any() for state in group.optimizer.state.values() for value in state.values())


def test_the_schedule_scales_both_learning_rates():
    group = ParameterGroup(
        "g", net(), lambda modules, lr: Muon(modules, lr, adamw_lr=1e-4), schedule=Schedule(1e-2, "linear", steps=5)
    )
    assert group.apply(2, None, torch.tensor(True)) == 5e-3
    assert [each["lr"] for each in group.optimizer.param_groups] == [5e-3, 5e-5]
