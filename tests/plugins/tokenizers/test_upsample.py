"""Upsampling and convolution of the autoencoder, merged into one transposed convolution on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from plugins.tokenizers.autoencoder_kl import Upsample


def run(layer: Upsample, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, layer.conv.weight, layer.conv.bias))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
def test_merged_equals_plain(layout, size):
    torch.manual_seed(0)
    layer = Upsample(6).double().to(memory_format=layout)
    x = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=layout)
    merged = run(layer, x)
    layer.merges = False
    for ours, plain in zip(merged, run(layer, x), strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_it_is_merged_only_where_that_is_faster(monkeypatch):
    layer, x, calls = Upsample(4), torch.randn(1, 4, 2, 2), []
    transposed = F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d", lambda *x, **options: calls.append(0) or transposed(*x, **options))
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    layer.bfloat16()(x.bfloat16())
    assert not calls
    layer.float()(x)
    assert len(calls) == 1
