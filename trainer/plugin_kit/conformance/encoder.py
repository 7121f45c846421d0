"""Checks of encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.contracts import Encoder
from trainer.plugin_kit.conformance.form import Form, attribute, images, shapes
from trainer.plugin_kit.conformance.form_checks import COMPUTES, bound
from trainer.plugin_kit.conformance.subject import Fault, Subject

SIDE, GRID = 32, 4
CASES = ((32, 4, 1), (64, 4, 2), (48, 3, 3), (64, 8, 2))  # pixels, tokens per side, images


def checks(subject: Subject) -> list:
    subject.make(SIDE, GRID)
    form = Form(
        make=lambda seed: subject.make(SIDE, GRID, seed=seed),
        inputs=lambda count: (images(count, SIDE),),
        call=lambda encoder, inputs: {"tokens": encoder(*inputs)},
        learns=False,
    )
    own = (has_its_attributes, gives_tokens_at_every_resolution, gives_rows_first)
    return [*own, *bound(form, is_frozen, *COMPUTES)]


def has_its_attributes(subject: Subject) -> None:
    """The encoder is an nn.Module with embed_dim, load_weights() and forward()."""
    part = subject.make(SIDE, GRID)
    if not isinstance(part, nn.Module):
        raise Fault(f"{type(part).__name__} is not an nn.Module")
    attribute(part, "embed_dim", int, "features D of a token")
    if not isinstance(part, Encoder):
        raise Fault("has no load_weights(); it must load the weights, or do nothing if there are none")


def gives_tokens_at_every_resolution(subject: Subject) -> None:
    """Images (B, 3, R, R) become tokens (B, grid * grid, embed_dim) for any R and grid."""
    for side, grid, count in CASES:
        encoder = subject.make(side, grid).eval()
        wanted = (count, grid**2, encoder.embed_dim)
        outputs = {"tokens": encoder(images(count, side))}
        found = outputs["tokens"]
        case = f"{count} images of {side} px and a grid of {grid}"
        if isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] > grid**2 and found.shape[1] - grid**2 < 9:
            raise Fault(
                f"tokens have shape {tuple(found.shape)} for {case}; expected {wanted}: drop class and register tokens"
            )
        shapes(outputs, {"tokens": wanted}, case)


def gives_rows_first(subject: Subject) -> None:
    """Tokens are in row-major order: the upper right image corner affects token grid - 1 most."""
    encoder = subject.make(SIDE, GRID).eval()
    x = images(1, SIDE)
    y, patch = x.clone(), SIDE // GRID
    y[..., :patch, -patch:] *= -1
    change = (encoder(x) - encoder(y)).detach().float().norm(dim=-1)[0]
    if change[GRID * (GRID - 1)] > 2 * change[GRID - 1]:
        raise Fault("tokens are in column-major order; expected row-major, flatten(2) of (B, D, rows, columns)")


def is_frozen(form: Form) -> None:
    """No weight is trainable, and the tokens carry no gradient."""
    part = form.part()
    trainable = [name for name, p in part.named_parameters() if p.requires_grad]
    if trainable:
        raise Fault(
            f"{len(trainable)} of its parameters are trainable ({trainable[0]}, ...); end __init__ with "
            "self.requires_grad_(False).eval()"
        )
    before = {name: buffer.clone() for name, buffer in part.named_buffers()}
    if form.call(part, form.inputs(2))["tokens"].requires_grad:
        raise Fault("its tokens carry a gradient; decorate forward with @torch.no_grad()")
    changed = [name for name, b in part.named_buffers() if not torch.equal(b, before[name])]
    if changed:
        raise Fault(f"a forward pass changes the buffer {changed[0]}; a frozen encoder must not update statistics")
