"""GroupNorm has the values and gradients of ``nn.GroupNorm`` on each of its paths."""

import pytest
import torch
from torch import nn

from components.nn import group_norm
from components.nn.group_norm import FromChannels, GroupNorm, GroupNormSiLU

SHAPE, GROUPS = (3, 12, 5, 7), 4


def pair(dtype: torch.dtype = torch.float64, kind: type[GroupNorm] = GroupNorm) -> tuple[GroupNorm, nn.GroupNorm]:
    """The project's module and PyTorch's, with the same random weights."""
    ours, theirs = kind(GROUPS, SHAPE[1], eps=1e-6), nn.GroupNorm(GROUPS, SHAPE[1], eps=1e-6)
    for p in ours.parameters():
        nn.init.normal_(p, 0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def maps(dtype: torch.dtype, layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps whose mean is large against their deviation, and a gradient."""
    x, grad = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(2))
    return tuple(value.to(dtype).contiguous(memory_format=layout) for value in (2 * x + 3, grad))


def results(norm: nn.GroupNorm, call, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, norm.weight, norm.bias], grad.to(y.dtype))]


@pytest.fixture(params=[torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
def layout(request) -> torch.memory_format:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
@pytest.mark.parametrize("path", ["module", "channel statistics", "compiled channel statistics"])
def test_fp64_values_and_gradients(layout, path, kind):
    ours, theirs = pair(kind=kind)

    def statistics(x):
        return FromChannels.apply(x, ours.weight, ours.bias, GROUPS, ours.eps, ours.silu)

    def expected_of(x):
        return nn.functional.silu(theirs(x)) if kind.silu else theirs(x)

    compiled = torch.compile(statistics, backend="aot_eager", fullgraph=True)
    call = {"module": ours, "channel statistics": statistics, "compiled channel statistics": compiled}[path]
    x, grad = maps(torch.float64, layout)
    for got, expected in zip(results(ours, call, x, grad), results(theirs, expected_of, x, grad)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_derivative_of_the_backward_pass_is_refused():
    """It is written out by hand; a wrong second derivative without an error would be worse."""
    ours, _ = pair()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    y = FromChannels.apply(x, ours.weight, ours.bias, GROUPS, ours.eps, False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bf16_on_a_cpu(layout):
    """Values are bit for bit PyTorch's; gradients are as close to fp64 as rounding them to bf16 allows."""
    ours, theirs = pair(torch.float32)
    x, grad = maps(torch.bfloat16, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = results(ours, ours, x, grad), results(theirs, theirs, x, grad)
    assert torch.equal(got[0], plain[0]) and got[0].is_contiguous(memory_format=layout)
    exact = results(theirs.double(), theirs, x.double(), grad.double())
    assert [value.dtype for value in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert got[1].is_contiguous(memory_format=layout)
    errors = [float((value.double() - e).norm() / e.norm()) for value, e in zip(got, exact)]
    assert errors[1] < 4e-3 and max(errors[2:]) < 1e-5, errors


def test_the_own_backward_pass_runs_in_channels_last_only_and_can_be_switched_off(layout, monkeypatch):
    def refuse(*inputs):
        raise NotImplementedError

    monkeypatch.setattr(group_norm._ChannelsLastBF16, "apply", refuse)
    ours, _ = pair(torch.float32)
    x, _ = maps(torch.bfloat16, layout)
    ours(x.float())
    if layout is torch.channels_last:
        with pytest.raises(NotImplementedError):
            ours(x)
    monkeypatch.setattr(GroupNorm, "fast", False)
    ours(x)


def test_weights_without_gradients_and_without_affine(layout):
    ours, _ = pair(torch.float32)
    ours.requires_grad_(False)
    x, grad = maps(torch.bfloat16, layout)
    x.requires_grad_()
    ours(x).backward(grad)
    assert x.grad.isfinite().all() and ours.weight.grad is None
    plain = GroupNorm(GROUPS, SHAPE[1], affine=False)
    assert torch.equal(plain(x), nn.functional.group_norm(x, GROUPS))


def test_compiles_and_has_the_keys_of_pytorch(layout):
    ours, theirs = pair(torch.float32)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, grad = maps(torch.bfloat16, layout)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for got, expected in zip(results(ours, compiled, x, grad), results(theirs, theirs, x, grad)):
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.1)
