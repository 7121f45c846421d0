"""Checks of tokenizers."""

from __future__ import annotations

from typing import Any

from torch import nn

from components.contracts import Posterior, Tokenizer
from trainer.plugin_kit.conformance.form import Form, Inputs, Outputs, attribute, images, normal, reaches, shapes
from trainer.plugin_kit.conformance.form_checks import COMPUTES, bound, learns_with_all_of_it
from trainer.plugin_kit.conformance.subject import Fault, Subject

METHODS = ("encode", "decode")
POSITIONS = 4  # latent positions per side in most checks


def checks(subject: Subject) -> list:
    part = subject.make()
    form = Form(
        make=lambda seed: subject.make(seed=seed),
        inputs=lambda count: (images(count, _side(part)),),
        call=round_trip,
        methods=METHODS,
        learns=getattr(part, "trainable", True),
        at_least_fp32=("mean", "logvar"),
    )
    return [has_its_attributes, keeps_shapes, bounds_its_variance, passes_gradients, freezes_on_request, *bound(
        form, learns_with_all_of_it, *COMPUTES
    )]  # fmt: skip


def round_trip(tokenizer: Any, inputs: Inputs) -> Outputs:
    posterior = tokenizer.encode(*inputs)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "image": tokenizer.decode(posterior.mean)}


def has_its_attributes(subject: Subject) -> None:
    """The tokenizer is an nn.Module with factor, channels, encode, decode, load_weights and units."""
    part = subject.make()
    if not isinstance(part, nn.Module):
        raise Fault(f"{type(part).__name__} is not an nn.Module")
    if attribute(part, "factor", int, "pixels per latent position along a side") < 1:
        raise Fault(f"factor = {part.factor}: expected at least 1 pixel per latent position")
    attribute(part, "channels", int, "latent channels C")
    lacking = [name for name in ("encode", "decode", "load_weights", "units") if not hasattr(part, name)]
    if lacking or not isinstance(part, Tokenizer):
        raise Fault(f"has no {', '.join(lacking)}")


def keeps_shapes(subject: Subject) -> None:
    """Images (B, 3, R, R) become a posterior over (B, C, R / factor, R / factor), which decodes to images."""
    part = subject.make()
    for side, count in ((_side(part, 2), 1), (_side(part, 4), 2), (_side(part, 8), 3)):
        positions = side // part.factor
        case = f"{count} images of {side} px"
        posterior = part.encode(images(count, side))
        if not isinstance(posterior, Posterior):
            raise Fault(f"encode returns a {type(posterior).__name__}; expected components.contracts.Posterior")
        latent = (count, part.channels, positions, positions)
        found = {"the posterior's mean": posterior.mean, "the posterior's logvar": posterior.logvar}
        shapes(found, dict.fromkeys(found, latent), case)
        image = part.decode(posterior.mean)
        shapes({"the decoded image": image}, {"the decoded image": (count, 3, side, side)}, case)


def bounds_its_variance(subject: Subject) -> None:
    """The log-variance stays in [-30, 20] for any image."""
    part = subject.make()
    logvar = part.encode(1e6 * images(2, _side(part))).logvar
    low, high = logvar.min().item(), logvar.max().item()
    if not -30 <= low <= high <= 20:
        raise Fault(f"logvar ranges from {low:.3g} to {high:.3g} for a large input; end with .clamp(-30.0, 20.0)")


def passes_gradients(subject: Subject) -> None:
    """Through frozen weights, gradients of decode reach the latents, and those of encode, if it learns, the image."""
    part = subject.make()
    x = images(2, _side(part))
    if part.encode(x).mean.requires_grad:
        part.requires_grad_(False)
        x.requires_grad_()
        # Squared, because after a final norm the gradient of a plain mean is zero.
        if not reaches(part.encode(x).mean.square().mean(), x):
            raise Fault("encode passes no finite, nonzero gradient to the image")
    z = normal("latent", 2, part.channels, *[_side(part) // part.factor] * 2).requires_grad_()
    if getattr(part, "trainable", True) and not reaches(part.requires_grad_(False).decode(z).square().mean(), z):
        raise Fault("decode passes no finite, nonzero gradient to the latents (torch.no_grad() or detach()?)")


def freezes_on_request(subject: Subject) -> None:
    """If all weights are frozen, the tokenizer sets trainable = False."""
    part = subject.make()
    trainable = getattr(part, "trainable", True)
    learning = [name for name, p in part.named_parameters() if p.requires_grad]
    if trainable and not learning and any(True for _ in part.parameters()):
        raise Fault("every weight is frozen; set trainable = False, so that recipes that train it can refuse it")


def _side(part: Any, positions: int = POSITIONS) -> int:
    """Return the image side in pixels for ``positions`` latent positions, or the tokenizer's fixed resolution."""
    return getattr(part, "resolution", None) or positions * part.factor
