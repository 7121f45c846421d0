"""Faster forms of the autoencoder's layers equal the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from components.distributed.parallel import compile_units
from plugins.tokenizers.autoencoder_kl import AutoencoderKL, Upsample, doubled, explicit_attention


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


def test_upsampling_by_copies_equals_interpolation():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    plain, ours = F.interpolate(x, scale_factor=2.0, mode="nearest"), doubled(x)
    assert torch.equal(ours, plain)
    grad = torch.randn_like(plain)
    expected, found = (torch.autograd.grad(y, x, grad)[0] for y in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_explicit_attention_equals_the_fused_one():
    q, k, v = inputs = torch.randn(3, 2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    plain, ours = F.scaled_dot_product_attention(q, k, v), explicit_attention(q, k, v)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(y.square().sum(), inputs)[0] for y in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_output_layers_are_compiled_beside_the_stages():
    """They run at full resolution: in eager mode, they would take 4 % of a step on a GPU."""
    tokenizer, shapes = AutoencoderKL(channels=8, multipliers=[1, 2], res_blocks=1, norm_groups=2), []

    def backend(graph, inputs):
        shapes.extend(tuple(node.meta["example_value"].shape) for node in graph.graph.find_nodes(op="placeholder"))
        return graph

    x = torch.randn(2, 3, 16, 16)
    expected = tokenizer.decode(tokenizer.encode(x).mean)
    compile_units(tokenizer, backend)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(x).mean), expected)
    heads = [tuple(part.conv_out.weight.shape) for part in (tokenizer.encoder, tokenizer.decoder)]
    assert set(heads) <= set(shapes)


def test_upsampled_maps_and_their_gradients_are_channels_last():
    """Otherwise each convolution behind or before them copies its input or gradient: 9 of 314 ms on a GPU."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = doubled(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.is_contiguous(memory_format=torch.channels_last)
