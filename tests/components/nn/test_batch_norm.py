"""Batch norm across ranks equals batch norm of the whole batch, for any number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.nn.batch_norm import SyncBatchNorm2d, batch_norm, batch_stats
from components.nn.latent_norm import LatentNorm
from tests.support.ranks import run_ranks

SHAPE = (8, 5, 6, 3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(mean: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch and the gradient of its normalized values."""
    g = torch.Generator().manual_seed(0)
    x = mean + torch.randn(SHAPE, generator=g, dtype=torch.float64) * torch.linspace(0.5, 2, 5)[:, None, None]
    return x.to(dtype), torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype)


def affine(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, 5))
        module.bias.copy_(torch.linspace(-1, 1, 5))
    return module


def split(x: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
    return x.split(sizes)[rank].clone()


def sync_norm_rank(rank: int, world: int, sizes: list[int], mean: float, dtype: torch.dtype) -> dict:
    x, grad = (split(t, sizes, rank) for t in data(mean, dtype))
    norm = affine(SyncBatchNorm2d(5).to(dtype))
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad, **norm.state_dict()}


def compiled_rank(rank: int, world: int) -> list[list[torch.Tensor]]:
    results = []
    for compiled in (False, True):
        x, grad = (t.chunk(world)[rank].clone() for t in data())
        norm = affine(SyncBatchNorm2d(5))
        x.requires_grad_()
        call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
        y = call(x)
        y.backward(grad)
        results.append([y.detach(), x.grad, norm.weight.grad, norm.running_mean, norm.running_var])
    return results


def latent_norm_rank(rank: int, world: int) -> dict:
    x, grad = (split(t, [SHAPE[0] // world] * world, rank) for t in data())
    norm = LatentNorm(5)
    x.requires_grad_()
    y = norm.batch(x)
    y.backward(grad)
    unmoved = {k: v.clone() for k, v in norm.state_dict().items()}
    again = norm.batch(x.detach(), update=False)
    assert all(torch.equal(v, unmoved[k]) for k, v in norm.state_dict().items())
    return {"y": y.detach(), "again": again, "dx": x.grad, **unmoved}


def stats_rank(rank: int, world: int) -> list[torch.Tensor]:
    return list(batch_stats(split(data()[0], [SHAPE[0] // world] * world, rank)))


def reference(mean: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[nn.BatchNorm2d, dict]:
    x, grad = data(mean, dtype)
    norm = affine(nn.BatchNorm2d(5).to(dtype))
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    return norm, {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad, **norm.state_dict()}


@pytest.mark.parametrize("sizes", [[4, 4], [7, 1], [2, 2, 2, 2]], ids=str)
def test_ranks_match_one_process(sizes):
    results = run_ranks(sync_norm_rank, len(sizes), sizes, 0.5, torch.float32)
    norm, expected = reference()
    close = {"rtol": 1e-6, "atol": 1e-6}
    for key in ("y", "dx"):
        torch.testing.assert_close(torch.cat([r[key] for r in results]), expected[key], **close)
    for key in ("dw", "db"):  # data parallelism sums these
        torch.testing.assert_close(sum(r[key] for r in results), expected[key], rtol=1e-6, atol=1e-5)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(results[0][key], expected[key], **close)
        assert all(torch.equal(results[0][key], r[key]) for r in results), f"{key} differs between ranks"
    assert set(norm.state_dict()) <= set(results[0])


def test_ranks_match_one_process_in_double():
    results = run_ranks(sync_norm_rank, 2, [4, 4], 0.5, torch.float64)
    _, expected = reference(dtype=torch.float64)
    for key in ("y", "dx"):
        got = torch.cat([r[key] for r in results])
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected[key], rtol=1e-12, atol=1e-12)


def test_large_mean_stays_accurate():
    results = run_ranks(sync_norm_rank, 2, [4, 4], 1e3, torch.float32)
    # In fp64 from the same fp32 values. E[x^2] - E[x]^2 in fp32 would be off by 0.1 here.
    x = data(1e3)[0].double()
    exact = F.batch_norm(x, None, None, torch.linspace(0.5, 1.5, 5).double(), torch.linspace(-1, 1, 5).double(), True)
    got = torch.cat([r["y"] for r in results]).double()
    torch.testing.assert_close(got, exact, rtol=0, atol=2e-4)
    var = 0.9 + 0.1 * x.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(results[0]["running_var"].double(), var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_latent_norm_over_ranks(world):
    results = run_ranks(latent_norm_rank, world)
    x, grad = data()
    x.requires_grad_()
    norm = nn.BatchNorm2d(5, eps=1e-4, affine=False)
    y = norm(x)
    y.backward(grad)
    for key, expected in (("y", y.detach()), ("again", y.detach()), ("dx", x.grad)):
        torch.testing.assert_close(torch.cat([r[key] for r in results]), expected, rtol=1e-6, atol=1e-6)
    for key, expected in norm.state_dict().items():
        torch.testing.assert_close(results[0][key], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_compiles_whole_on_two_ranks():
    for eager, compiled in run_ranks(compiled_rank, 2):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_batch_stats():
    x = data()[0]
    flat = x.transpose(0, 1).flatten(1)
    for mean, var, count in (batch_stats(x), *run_ranks(stats_rank, 2)):
        torch.testing.assert_close(mean, flat.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, flat.var(1, unbiased=False), rtol=1e-6, atol=1e-6)
        assert type(count) is torch.Tensor and count == flat.shape[1]
    half = batch_stats(x.bfloat16())
    assert half.mean.dtype == half.var.dtype == torch.float32


def test_one_rank_is_torch_batch_norm():
    norm, expected = reference()
    ours = affine(SyncBatchNorm2d(5))
    assert set(ours.state_dict()) == set(norm.state_dict())
    x, grad = data()
    x.requires_grad_()
    y = ours(x)
    y.backward(grad)
    assert torch.equal(y, expected["y"]) and torch.equal(x.grad, expected["dx"])
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items() if key in expected)
    torch.testing.assert_close(ours.eval()(x), y)  # eval mode uses the batch's statistics
    assert SyncBatchNorm2d(5, affine=False).weight is None


def test_half_precision_is_normalized_in_fp32():
    x = data()[0].bfloat16()
    assert torch.equal(batch_norm(x), F.batch_norm(x.float(), None, None, training=True))


def test_latent_norm_forward_is_pure_and_inverts():
    norm = LatentNorm(5).train()
    mean, std = torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)
    norm.set_statistics(mean.view(1, 5, 1, 1), std.view(1, 5, 1, 1))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    assert set(before) == {"running_mean", "running_var", "num_batches_tracked"}
    z = data()[0]
    expected = F.batch_norm(z, mean, std.square(), training=False, eps=1e-4)
    torch.testing.assert_close(norm(z), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.invert(norm(z)), z, rtol=1e-6, atol=1e-6)
    assert torch.equal(norm.eval()(z), norm.train()(z))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert norm(z.bfloat16()).dtype == torch.float32
    assert norm.double()(z.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "mean, std, message",
    [
        (torch.zeros(4), torch.ones(5), "expected 5"),
        (torch.zeros(5), torch.zeros(5), "positive"),
        (torch.full((5,), torch.nan), torch.ones(5), "finite"),
    ],
)
def test_latent_norm_refuses_wrong_statistics(mean, std, message):
    with pytest.raises(ValueError, match=message):
        LatentNorm(5).set_statistics(mean, std)


def test_latent_norm_recovers_from_meta():
    with torch.device("meta"):
        norm = LatentNorm(5)
    norm.to_empty(device="cpu").init_weights()
    fresh = LatentNorm(5).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in norm.state_dict().items())


def test_statistics_per_position_are_those_of_each_position_alone():
    """Each position goes through a norm of its own; files per channel fill all positions, others are refused."""
    z = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = LatentNorm(2, positions=(3, 4)).double()
    found = norm.batch(z)
    for i in range(3):
        for j in range(4):
            alone = LatentNorm(2).double()
            at = z[:, :, i : i + 1, j : j + 1]
            torch.testing.assert_close(found[:, :, i : i + 1, j : j + 1], alone.batch(at), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(norm.running_mean[:, i, j], alone.running_mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(norm.running_var[:, i, j], alone.running_var, rtol=1e-12, atol=1e-12)
    mean, std = z.mean(0), z.std(0)
    norm.set_statistics(mean[None], std)
    torch.testing.assert_close(norm(z), (z - mean) / (std.square() + 1e-4).sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.invert(norm(z)), z, rtol=1e-12, atol=1e-12)
    norm.set_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert (norm.running_mean[1] == 2).all() and (norm.running_var[0] == 9).all()
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) of them, .* this resolution; got \(2, 6, 8\)"):
        norm.set_statistics(torch.zeros(2, 6, 8), torch.ones(2, 6, 8))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\): one per position, for latent_norm.per_position = true"):
        LatentNorm(2).set_statistics(mean, std)
