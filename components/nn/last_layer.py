"""Gradients of losses with respect to the weight of a tokenizer's last layer, without its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.nn.precision import at_least_fp32


class LastLayer:
    """Keeps what the last layer of the latest decoding saw, until its gradients have been computed.

    The weight itself is not needed, so sharding and its dtype have no effect. The layer must not be compiled: compiled
    code would free what a second backward pass through it needs.

    Args:
        layer: a linear layer or a 2-D convolution with zero padding.

    Raises:
        ValueError: another layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros")):
            raise ValueError(f"last layer: expected nn.Linear or nn.Conv2d with zero padding, got {layer}")
        self.layer = layer
        self._seen: tuple[Tensor, Tensor] | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._seen = (arguments[0].detach(), output) if output.requires_grad else None

    def weight_gradients(self, x_hat: Tensor, *gradients: Tensor) -> Tensor:
        """Gradients of the weight, one row for each of ``gradients``, in at least fp32.

        Args:
            x_hat: result of the latest decoding, (B, 3, R, R).
            gradients: of losses with respect to ``x_hat``.
        """
        if self._seen is None:
            raise RuntimeError("last layer: decode with gradients before, once for each call")
        (x, y), self._seen = self._seen, None
        found = [torch.autograd.grad(x_hat, y, gradient, retain_graph=True)[0] for gradient in gradients]
        return torch.stack([self._weight_gradient(at_least_fp32(x), at_least_fp32(g)).flatten() for g in found])

    def _weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return g.flatten(0, -2).T @ x.flatten(0, -2)
        assert isinstance(layer, nn.Conv2d)
        shape = layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
        return nn.grad.conv2d_weight(x, shape, g, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
