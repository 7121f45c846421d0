"""The adaptive weight of an adversarial loss (VQGAN: Esser et al. 2021, arXiv 2012.09841, equation 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.contracts import LossTerm, Modules, Posterior, RandomNumbers
from components.diffusion.random_numbers import of_discriminator
from components.distributed.parallel import mean_over_ranks

LARGEST = 1e4


def adaptive_reconstruction(
    m: Modules, x: Tensor, x_hat: Tensor, posterior: Posterior, step: int, random: RandomNumbers | None = None
) -> dict[str, LossTerm]:
    """The reconstruction losses, and the generator loss at a weight that balances their gradients.

    The factor is lambda = |grad L_rec| / (|grad L_gan| + ``adaptive_eps``), at most 1e4, with L_rec the weighted sum of
    the reconstruction losses, L_gan the generator loss, and gradients with respect to the decoder's last weight, of
    this micro-batch over all ranks. It is a constant of the backward pass. The term "gan_weight", of weight 0, reports
    it.

    Each loss network runs backward once, here; the terms carry the gradients with respect to the reconstruction and the
    posterior, from which the tokenizer's one backward pass continues. Collective; does not wait for the device.
    """
    assert m.discriminator is not None and m.last_layer is not None
    inputs = x_hat, posterior.mean, posterior.logvar
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    terms, to_x_hat = {}, torch.zeros_like(x_hat)
    for name, loss in m.reconstruction.items():
        value, gradients = _differentiated(loss(x, leaves[0], Posterior(leaves[1], leaves[2])), leaves)
        terms[name] = LossTerm(loss.weight, _Known.apply(value, gradients, *inputs))
        if gradients[0] is not None:
            to_x_hat = to_x_hat + loss.weight * gradients[0]
    numbers = of_discriminator(m.discriminator, random)
    value, gradients = _differentiated(m.discriminator.generator(leaves[0], step, **numbers), leaves)
    weight: Any = m.discriminator.weight
    if gradients[0] is not None:
        pair = mean_over_ranks(m.last_layer.weight_gradients(x_hat, to_x_hat, gradients[0]))
        of_rec, of_gan = pair.norm(dim=1).unbind()
        factor = (of_rec / (of_gan + m.discriminator.adaptive_eps)).clamp(0, LARGEST)
        weight = weight * factor
        terms["gan_weight"] = LossTerm(0.0, factor)
    terms["gan"] = LossTerm(weight, _Known.apply(value, gradients, *inputs))
    return terms


def _differentiated(value: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """A loss without its graph, and its gradient with respect to each leaf; None where it does not depend on it."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not value.requires_grad or not wanted:
        return value.detach(), [None] * len(leaves)
    with torch.autocast(value.device.type, enabled=False):  # as in a step's backward pass
        found = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    return value.detach(), [next(found) if leaf.requires_grad else None for leaf in leaves]


class _Known(torch.autograd.Function):
    """A scalar whose gradients with respect to some tensors are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(None if g is None else outer.to(g.dtype) * g for g in gradients)
