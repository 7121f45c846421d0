"""Checks of tokenizers."""

from __future__ import annotations

from components.contracts import Posterior, Tokenizer
from trainer.plugin_kit.conformance import generic
from trainer.plugin_kit.conformance.adapter import Adapter, Inputs, Outputs, images, normal, reaches, shapes
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute

POSITIONS = 4  # latent positions per side in most checks


def checks(case: Case) -> list[Check]:
    part = case.make()
    adapter = Adapter(
        make=case.make,
        inputs=lambda count: (images(count, _side(part)),),
        call=_round_trip,
        learns=part.trainable,
        may_be_bf16=("image",),
    )
    own = (sets_every_attribute, keeps_shapes, clamps_logvar, passes_gradients, declares_frozen_weights)
    return bind(case, case, *own) + generic.checks(case, adapter, generic.every_weight_gets_a_gradient)


def keeps_shapes(case: Case) -> None:
    """Images (B, 3, R, R) become a posterior over (B, C, R / factor, R / factor), which decodes to images."""
    part = case.make()
    for side, count in ((_side(part, 2), 1), (_side(part, 4), 2), (_side(part, 8), 3)):
        positions = side // part.factor
        where = f"{count} images of {side} px"
        posterior = part.encode(images(count, side))
        if not isinstance(posterior, Posterior):
            raise Failure(f"encode returns a {type(posterior).__name__}; expected components.contracts.Posterior")
        latents = {f"the posterior's {name}": value for name, value in posterior._asdict().items()}
        shapes(latents, (count, part.channels, positions, positions), where)
        shapes({"the decoded image": part.decode(posterior.mean)}, (count, 3, side, side), where)


def clamps_logvar(case: Case) -> None:
    """The log-variance stays in [-30, 20] for any image."""
    part = case.make()
    logvar = part.encode(1e6 * images(2, _side(part))).logvar
    low, high = logvar.min().item(), logvar.max().item()
    if not -30 <= low <= high <= 20:
        raise Failure(f"logvar ranges from {low:.3g} to {high:.3g} for a large input; end with .clamp(-30.0, 20.0)")


def passes_gradients(case: Case) -> None:
    """Through frozen weights, gradients of decode reach the latents, and those of encode, if it learns, the image."""
    part = case.make()
    x = images(2, _side(part))
    if part.encode(x).mean.requires_grad:
        part.requires_grad_(False)
        x.requires_grad_()
        # Squared, because after a final norm the gradient of a plain mean is zero.
        if not reaches(part.encode(x).mean.square().mean(), x):
            raise Failure("encode passes no finite, nonzero gradient to the image")
    z = normal("latent", 2, part.channels, *[_side(part) // part.factor] * 2).requires_grad_()
    if part.trainable and not reaches(part.requires_grad_(False).decode(z).square().mean(), z):
        raise Failure("decode passes no finite, nonzero gradient to the latents (torch.no_grad() or detach()?)")


def declares_frozen_weights(case: Case) -> None:
    """If all weights are frozen, the tokenizer sets trainable = False."""
    part = case.make()
    weights = list(part.parameters())
    if part.trainable and weights and not any(p.requires_grad for p in weights):
        raise Failure("every weight is frozen; set trainable = False, so that recipes that train it can refuse it")


def _round_trip(tokenizer: Tokenizer, inputs: Inputs) -> Outputs:
    posterior = tokenizer.encode(*inputs)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "image": tokenizer.decode(posterior.mean)}


def _side(part: Tokenizer, positions: int = POSITIONS) -> int:
    """Return the image side in pixels for ``positions`` latent positions, or the tokenizer's fixed resolution."""
    return part.resolution or positions * part.factor
