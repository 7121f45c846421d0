"""Checks of losses: reconstruction, adversarial and alignment losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.contracts import AdversarialLoss, Network, Posterior, RandomNumbers
from components.diffusion.random_numbers import SAMPLERS, generator
from trainer.plugin_kit.conformance import generic
from trainer.plugin_kit.conformance.adapter import (
    Adapter,
    Inputs,
    Outputs,
    images,
    normal,
    only_reported,
    reaches,
    scalar,
    shapes,
)
from trainer.plugin_kit.conformance.case import GIVEN, SIDE, Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute

WIDTH, DIMENSIONS = 48, (24, 32)
GRID = GIVEN["grid"]
LATE = 10**9  # a step after any start step


def checks(case: Case) -> list[Check]:
    role = case.plugin.cls.role
    return {"reconstruction": _reconstruction, "discriminator": _adversarial, "alignment": _alignment}[role](case)


def _reconstruction(case: Case) -> list[Check]:
    adapter = Adapter(
        make=case.make,
        inputs=_reconstructions,
        call=lambda loss, x: {"loss": loss(x[0], _network_output(x[1]), Posterior(x[2], x[3]))},
        learns=False,
    )
    own = (is_a_scalar, has_a_gradient, generic.is_frozen)
    return bind(case, case, sets_every_attribute) + generic.checks(case, adapter, *own)


def _adversarial(case: Case) -> list[Check]:
    def call(loss: AdversarialLoss, x: Inputs) -> Outputs:
        random = _random(loss, len(x[0]))
        terms, _ = loss.discriminator(x[0], _network_output(x[1]), LATE, **random)
        return {"generator": loss.generator(_network_output(x[1]), LATE, **random), **terms}

    adapter = Adapter(make=case.make, inputs=_reconstructions, call=call)
    own = (is_a_scalar, has_both_losses, generic.every_weight_gets_a_gradient)
    return bind(case, case, sets_every_attribute) + generic.checks(case, adapter, *own)


def _alignment(case: Case) -> list[Check]:
    adapter = Adapter(
        make=lambda seed: _Alignment(case, seed),
        inputs=lambda count: tuple(
            normal(f"tokens {features}", count, GRID**2, features) for features in (WIDTH, *DIMENSIONS)
        ),
        call=lambda loss, x: loss(*x),
        may_be_bf16=("head",),
    )
    own = (prefers_the_target, generic.every_weight_gets_a_gradient)
    return bind(case, case, sets_every_attribute, makes_heads) + generic.checks(case, adapter, *own)


def is_a_scalar(adapter: Adapter) -> None:
    """Every loss is a finite scalar, for one and for several images."""
    for count in (1, 2, 3):
        for name, value in adapter.call(adapter.part(), adapter.inputs(count)).items():
            scalar(value, name)


def has_a_gradient(adapter: Adapter) -> None:
    """The gradient reaches the reconstruction or the posterior, and is finite if both images are equal."""
    part = adapter.part()
    x, x_hat, mean, logvar = adapter.inputs(2)
    for where, reconstruction in (("", x_hat), (" if image and reconstruction are equal", x.clone())):
        sources = [t.clone().requires_grad_() for t in (reconstruction, mean, logvar)]
        loss = part(x, sources[0], Posterior(*sources[1:]))
        if not loss.requires_grad:
            raise Failure("no gradient reaches the reconstruction or the posterior (torch.no_grad() or detach()?)")
        found = [g for g in torch.autograd.grad(loss, sources, allow_unused=True) if g is not None]
        if not all(g.isfinite().all() for g in found):
            raise Failure(f"the gradient is not finite{where}")
        if not where and not any(g.any() for g in found):
            raise Failure("the gradient is zero, so the tokenizer cannot learn from this loss")


def has_both_losses(adapter: Adapter) -> None:
    """The generator's loss has a gradient for the reconstruction; discriminator() returns two dicts of scalars."""
    part = adapter.part()
    x, x_hat, *_ = adapter.inputs(2)
    x_hat.requires_grad_()
    random = _random(part, len(x))
    if not reaches(part.generator(x_hat, LATE, **random), x_hat):
        raise Failure("generator(x_hat, step): no gradient reaches the reconstruction")
    found = part.discriminator(x, x_hat.detach(), LATE, **random)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(values, dict) for values in found)):
        raise Failure("discriminator(x, x_hat, step) must return two dicts: scalars to minimize, and scalars to report")
    for name, value in found[1].items():
        scalar(value, name)
    only_reported(found[1])


def makes_heads(case: Case) -> None:
    """make_heads returns an nn.ModuleList with one head per encoder: (B, N, width) -> (B, N, D_k)."""
    for grid, count in ((GRID, 2), (8, 1)):
        heads = case.make().make_heads(WIDTH, DIMENSIONS, grid)
        if not isinstance(heads, nn.ModuleList) or len(heads) != len(DIMENSIONS):
            raise Failure(f"make_heads(width, embed_dims, grid) must return an nn.ModuleList of {len(DIMENSIONS)} here")
        for head, dimension in zip(heads, DIMENSIONS):
            output = head(normal("tokens", count, grid**2, WIDTH))
            where = f"{count} x {grid**2} tokens of {WIDTH} features and an encoder of {dimension}"
            shapes({"a head's output": output}, (count, grid**2, dimension), where)
        if not any(p.requires_grad for p in heads.parameters()):
            raise Failure("the heads have no trainable weights")


def prefers_the_target(adapter: Adapter) -> None:
    """The loss is a scalar, lower for tokens equal to the target than for others, and has a gradient for the tokens."""
    loss = adapter.part().loss
    target = adapter.inputs(3)[1]
    tokens = normal("projected", *target.shape).requires_grad_()
    far, near = loss.align([tokens], [target]), loss.align([target], [target])
    scalar(far, "align")
    if not near < far:
        raise Failure(
            f"the loss of the target itself ({near.item():.3g}) is not below that of random tokens ({far.item():.3g})"
        )
    if not reaches(far, tokens):
        raise Failure("align: no gradient reaches the projected tokens")


class _Alignment(Network):
    """An alignment loss and its heads as one network, with each head as a unit, as in training."""

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__()
        self.loss = case.make(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = self.loss.make_heads(WIDTH, DIMENSIONS, GRID)

    def initializes_itself(self) -> bool:
        return all(isinstance(head, Network) and head.initializes_itself() for head in self.heads)

    def init_weights(self) -> None:
        for head in self.heads:
            head.init_weights()

    def units(self) -> list[nn.Module]:
        return list(self.heads)

    def forward(self, tokens: Tensor, *targets: Tensor) -> Outputs:
        projected = [head(_network_output(tokens)) for head in self.heads]
        return {"align": self.loss.align(projected, targets)} | {f"head {i}": p for i, p in enumerate(projected)}


def _reconstructions(count: int) -> Inputs:
    """Return image, reconstruction, posterior mean and log-variance."""
    x = images(count, SIDE)
    x_hat = (x + 0.3 * normal("error", count, 3, SIDE, SIDE)).clamp(-1, 1)
    return x, x_hat, normal("mean", count, 4, 8, 8), 0.1 * normal("logvar", count, 4, 8, 8) - 1


def _network_output(x: Tensor) -> Tensor:
    """Cast to bf16 under autocast, like the output of a network."""
    return x.bfloat16() if torch.is_autocast_enabled("cpu") else x


def _random(loss: AdversarialLoss, count: int) -> dict[str, RandomNumbers]:
    """The loss's random numbers as an argument of its methods; those of an image do not depend on the count."""

    def of_image(name: str, index: int) -> Tensor:
        declared = loss.random_numbers[name]
        return SAMPLERS[declared.kind](*declared.shape, generator=generator(name, index))

    numbers = {name: torch.stack([of_image(name, i) for i in range(count)]) for name in loss.random_numbers}
    return {"random": numbers} if numbers else {}
