"""Checks of losses; a loss's methods determine whether it is a reconstruction, adversarial or alignment loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import AdversarialLoss, AlignmentLoss, Posterior
from trainer.plugin_kit.conformance.form import Form, Inputs, Outputs, attribute, images, normal, reaches, shapes
from trainer.plugin_kit.conformance.form_checks import COMPUTES, bound, learns_with_all_of_it, scalar
from trainer.plugin_kit.conformance.subject import Fault, Subject

SIDE, WIDTH, GRID, DIMENSIONS = 32, 48, 4, (24, 32)
LATE = 10**9  # a step after any start step


def checks(subject: Subject) -> list:
    part = subject.make()
    # One method suffices here, unlike in the trainer, so that the checks can name the missing ones.
    if hasattr(part, "make_heads") or hasattr(part, "align"):
        return _alignment(subject)
    if hasattr(part, "generator") or hasattr(part, "discriminator"):
        return _adversarial(subject)
    return _reconstruction(subject)


def _reconstruction(subject: Subject) -> list:
    form = Form(
        make=lambda seed: subject.make(seed=seed),
        inputs=_pictures,
        call=lambda loss, x: {"loss": loss(x[0], _low(x[1]), Posterior(x[2], x[3]))},
        learns=False,
        at_least_fp32=("loss",),
    )
    return [has_weight_and_call, *bound(form, is_a_scalar, pulls_at_the_reconstruction, has_no_weights, *COMPUTES)]


def _adversarial(subject: Subject) -> list:
    def call(loss: Any, x: Inputs) -> Outputs:
        terms, _ = loss.discriminator(x[0], _low(x[1]), LATE)
        return {"generator": loss.generator(_low(x[1]), LATE), **terms}

    form = Form(
        make=lambda seed: subject.make(seed=seed),
        inputs=_pictures,
        call=call,
        at_least_fp32=("generator", "hinge"),
    )
    own = (is_a_scalar, judges_images, has_all_weights_in_units, learns_with_all_of_it)
    return [has_a_weight, has_both_sides, *bound(form, *own, *COMPUTES)]


def _alignment(subject: Subject) -> list:
    form = Form(
        make=lambda seed: subject.make(seed=seed),
        inputs=_tokens,
        call=lambda loss, x: {"align": loss.align([_low(x[0])], [x[1]])},
        learns=False,
        at_least_fp32=("align",),
    )
    heads = Form(
        make=lambda seed: _Heads(subject, seed),
        inputs=lambda count: (normal("tokens", count, GRID**2, WIDTH),),
        call=lambda heads, x: {f"head {i}": out for i, out in enumerate(heads(*x))},
    )
    own = bound(form, is_a_scalar, prefers_the_target, *COMPUTES[:4])
    return [has_its_weights, makes_heads, *own, *_renamed(bound(heads, learns_with_all_of_it, *COMPUTES))]


def has_weight_and_call(subject: Subject) -> None:
    """The loss has a weight and is callable with image, reconstruction and posterior."""
    has_a_weight(subject)
    if not callable(subject.make()):
        raise Fault(
            "is none of the three kinds of losses: a reconstruction loss has __call__(x, x_hat, posterior), an "
            "adversarial loss has generator and discriminator, an alignment loss has make_heads and align"
        )


def has_a_weight(subject: Subject) -> None:
    """The loss has a weight in the tokenizer's loss."""
    attribute(subject.make(), "weight", (float, int), "weight in the tokenizer's loss")


def has_both_sides(subject: Subject) -> None:
    """The loss has generator(), discriminator() and parameters()."""
    _has_all(subject.make(), AdversarialLoss, ("generator", "discriminator", "parameters"))


def has_its_weights(subject: Subject) -> None:
    """The loss has a weight in the tokenizer's loss and one in the denoiser's."""
    for name in ("tokenizer_weight", "denoiser_weight"):
        attribute(subject.make(), name, (float, int), f"weight in the {name.split('_')[0]}'s loss")
    _has_all(subject.make(), AlignmentLoss, ("make_heads", "align"))


def is_a_scalar(form: Form) -> None:
    """Every loss is a finite scalar, for one and for several images."""
    for count in (1, 2, 3):
        for name, value in form.call(form.part(), form.inputs(count)).items():
            scalar(value, name)


def pulls_at_the_reconstruction(form: Form) -> None:
    """The gradient reaches the reconstruction or the posterior, and is finite if both images are equal."""
    part = form.part()
    x, x_hat, mean, logvar = form.inputs(2)
    for case, reconstruction in (("", x_hat), (" if image and reconstruction are equal", x.clone())):
        sources = [t.clone().requires_grad_() for t in (reconstruction, mean, logvar)]
        loss = part(x, sources[0], Posterior(*sources[1:]))
        if not loss.requires_grad:
            raise Fault("no gradient reaches the reconstruction or the posterior (torch.no_grad() or detach()?)")
        found = [g for g in torch.autograd.grad(loss, sources, allow_unused=True) if g is not None]
        if not all(g.isfinite().all() for g in found):
            raise Fault(f"the gradient is not finite{case}")
        if not case and not any(g.any() for g in found):
            raise Fault("the gradient is zero, so the tokenizer cannot learn from this loss")


def has_no_weights(form: Form) -> None:
    """No weight is trainable, because a reconstruction loss has no optimizer."""
    part = form.part()
    if isinstance(part, nn.Module) and (names := [n for n, p in part.named_parameters() if p.requires_grad]):
        raise Fault(f"{names[0]} is trainable, but has no optimizer; end __init__ with self.requires_grad_(False)")


def judges_images(form: Form) -> None:
    """The generator's loss has a gradient for the reconstruction; discriminator() returns two dicts of scalars."""
    part = form.part()
    x, x_hat, *_ = form.inputs(2)
    x_hat.requires_grad_()
    loss = part.generator(x_hat, LATE)
    if not reaches(loss, x_hat):
        raise Fault("generator(x_hat, step): no gradient reaches the reconstruction")
    found = part.discriminator(x, x_hat.detach(), LATE)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, dict) for part in found)):
        raise Fault("discriminator(x, x_hat, step) must return two dicts: scalars to minimize, and scalars to report")
    for name, value in found[1].items():
        scalar(value, name)
        if value.requires_grad:
            raise Fault(f"{name} is only reported, but carries a gradient; detach it")


def has_all_weights_in_units(form: Form) -> None:
    """units() contain every weight of the discriminator."""
    part = form.part()
    units = list(part.units()) if hasattr(part, "units") else []
    inside = {p for unit in units for p in unit.parameters()}
    if outside := [name for name, p in part.named_parameters() if p not in inside]:
        raise Fault(f"{outside[0]} is in none of units(): generator() and discriminator() are not forward(), so FSDP2 "
                    "would not gather it")  # fmt: skip


def _has_all(part: Any, protocol: type, names: tuple[str, ...]) -> None:
    lacking = [name for name in names if not hasattr(part, name)]
    if lacking or not isinstance(part, protocol):
        raise Fault(f"has no {', '.join(lacking)}, required by components.contracts.{protocol.__name__}")


def makes_heads(subject: Subject) -> None:
    """make_heads returns an nn.ModuleList with one head per encoder: (B, N, width) -> (B, N, D_k)."""
    for grid, count in ((GRID, 2), (8, 1)):
        heads = subject.make().make_heads(WIDTH, DIMENSIONS, grid)
        if not isinstance(heads, nn.ModuleList) or len(heads) != len(DIMENSIONS):
            raise Fault(f"make_heads(width, embed_dims, grid) must return an nn.ModuleList of {len(DIMENSIONS)} here")
        for head, dimension in zip(heads, DIMENSIONS):
            found = {"a head's output": head(normal("tokens", count, grid**2, WIDTH))}
            case = f"{count} x {grid**2} tokens of {WIDTH} features and an encoder of {dimension}"
            shapes(found, dict.fromkeys(found, (count, grid**2, dimension)), case)
        if not any(p.requires_grad for p in heads.parameters()):
            raise Fault("the heads have no trainable weights")


def prefers_the_target(form: Form) -> None:
    """The loss is lower for tokens equal to the target than for random ones, and gradients reach the tokens."""
    part = form.part()
    tokens, target = form.inputs(3)
    tokens.requires_grad_()
    far, near = part.align([tokens], [target]), part.align([target], [target])
    if not near < far:
        raise Fault(
            f"the loss of the target itself ({near.item():.3g}) is not below that of random tokens ({far.item():.3g})"
        )
    if not reaches(far, tokens):
        raise Fault("align: no gradient reaches the projected tokens")


class _Heads(nn.Module):
    """Heads of an alignment loss as one module with each head as a unit, as in training."""

    def __init__(self, subject: Subject, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = subject.make(seed=seed).make_heads(WIDTH, DIMENSIONS, GRID)
        if all(hasattr(head, "init_weights") for head in self.heads):
            self.init_weights = self._init_heads

    def _init_heads(self) -> None:
        for head in self.heads:
            head.init_weights()

    def units(self) -> list[nn.Module]:
        return list(self.heads)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return [head(tokens) for head in self.heads]


def _renamed(functions: list) -> list:
    for function in functions:
        function.__name__ = f"heads_{function.__name__}"
    return functions


def _pictures(count: int) -> Inputs:
    """Return image, reconstruction, posterior mean and log-variance."""
    x = images(count, SIDE)
    x_hat = (x + 0.3 * normal("error", count, 3, SIDE, SIDE)).clamp(-1, 1)
    return x, x_hat, normal("mean", count, 4, 8, 8), 0.1 * normal("logvar", count, 4, 8, 8) - 1


def _tokens(count: int) -> Inputs:
    return normal("projected", count, GRID**2, DIMENSIONS[0]), normal("target", count, GRID**2, DIMENSIONS[0])


def _low(x: Tensor) -> Tensor:
    """Cast to bf16 under autocast, like the output of a network."""
    return x.bfloat16() if torch.is_autocast_enabled("cpu") else x
