"""Checks of denoisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import Denoiser, LatentShape
from trainer.plugin_kit.conformance.form import Form, Inputs, Outputs, attribute, distance, normal, reaches, shapes
from trainer.plugin_kit.conformance.form_checks import COMPUTES, bound, learns_with_all_of_it
from trainer.plugin_kit.conformance.subject import Fault, Subject

CLASSES = 10
SIDES = (8, 16, 32, 64)


def checks(subject: Subject) -> list:
    side = _side(subject)
    form = Form(
        make=lambda seed: subject.make(LatentShape(4, side, side), CLASSES, seed=seed),
        inputs=lambda count: inputs(count, 4, side),
        call=_everything,
        methods=("tokens",),
    )
    own = (has_its_attributes, keeps_shapes)
    rest = (tokens_are_those_of_the_whole, depends_on_all_inputs, leads_gradients_to_latents, learns_with_all_of_it)
    return [*own, *bound(form, *rest, *COMPUTES)]


def inputs(count: int, channels: int, side: int) -> Inputs:
    """Return x_t (count, channels, side, side), t (count,) and labels (count,); count is at most 3."""
    return normal("latent", count, channels, side, side), torch.tensor([0.2, 0.7, 0.5])[:count], torch.arange(count)


def has_its_attributes(subject: Subject) -> None:
    """The denoiser is an nn.Module with width, grid, align_depth, null_label and label_dropout."""
    side = _side(subject)
    part = subject.make(LatentShape(4, side, side), CLASSES)
    if not isinstance(part, nn.Module):
        raise Fault(f"{type(part).__name__} is not an nn.Module")
    attribute(part, "width", int, "features of a hidden token")
    attribute(part, "grid", int, "tokens per side")
    depth = attribute(part, "align_depth", (int, list, tuple), "block whose tokens are aligned, counted from 1")
    if min(depth if isinstance(depth, (list, tuple)) else [depth]) < 1:
        raise Fault(f"align_depth = {depth}: blocks are counted from 1")
    dropout = attribute(part, "label_dropout", (float, int), "probability of the null label in training")
    if not 0 <= dropout < 1:
        raise Fault(f"label_dropout = {dropout}: expected a probability in [0, 1)")
    null = attribute(part, "null_label", int, "label that means no class")
    if null < CLASSES:
        raise Fault(f"null_label = {null} is one of the {CLASSES} classes; expected num_classes")
    lacking = [name for name in ("tokens", "units") if not hasattr(part, name)]
    if lacking or not isinstance(part, Denoiser):
        raise Fault(f"has no method {', '.join(lacking)}")


def keeps_shapes(subject: Subject) -> None:
    """The velocity has the latent's shape and tokens are (B, grid * grid, width), also for the null label."""
    side = _side(subject)
    for channels, size, count in ((4, side, 1), (3, side, 2), (4, 2 * side, 3)):
        part = subject.make(LatentShape(channels, size, size), CLASSES).eval()
        x_t, t, labels = inputs(count, channels, size)
        case = f"{count} latents of {channels} x {size} x {size}"
        if part.label_dropout:
            labels[0] = part.null_label
        out = part(x_t, t, labels)
        if not hasattr(out, "velocity") or not hasattr(out, "tokens"):
            raise Fault(f"returns a {type(out).__name__}; expected components.contracts.DenoiserOutput")
        shapes({"velocity": out.velocity}, {"velocity": (count, channels, size, size)}, case)
        tokens = _named(out.tokens)
        depths = len(part.align_depth) if isinstance(part.align_depth, (list, tuple)) else 1
        if len(tokens) != depths:
            raise Fault(f"returns tokens of {len(tokens)} depths; align_depth = {part.align_depth} lists {depths}")
        shapes(tokens, dict.fromkeys(tokens, (count, part.grid**2, part.width)), case)


def tokens_are_those_of_the_whole(form: Form) -> None:
    """tokens() returns the same tokens as a full forward pass."""
    part, given = form.part(), form.inputs(2)
    whole, alone = _named(part(*given).tokens), _named(part.tokens(*given))
    if whole.keys() != alone.keys() or any(distance(alone[name], whole[name]) > 1e-6 for name in whole):
        raise Fault("tokens() differs from the tokens of a full forward pass: return those after block align_depth")


def depends_on_all_inputs(form: Form) -> None:
    """The velocity depends on the latents, the time and the label."""
    part, given = form.part(), form.inputs(2)
    changes = (("x_t", given[0] + 1), ("t", given[1] + 0.2), ("labels", given[2] + 1))
    velocity = part(*given).velocity
    for index, (name, value) in enumerate(changes):
        other = part(*given[:index], value, *given[index + 1 :]).velocity
        if torch.equal(other, velocity):
            raise Fault(f"the velocity does not depend on {name}")


def leads_gradients_to_latents(form: Form) -> None:
    """Gradients of tokens() reach the latents through frozen weights, so that alignment trains the tokenizer."""
    part, (x_t, t, labels) = form.part().requires_grad_(False), form.inputs(2)
    x_t.requires_grad_()
    for name, tokens in _named(part.tokens(x_t, t, labels)).items():
        # Squared, because after a final norm the gradient of a plain mean is zero.
        if not reaches(tokens.square().mean(), x_t):
            raise Fault(f"{name}: no gradient reaches the latents through tokens() (torch.no_grad() or detach()?)")


def _everything(part: Any, given: Inputs) -> Outputs:
    out = part(*given)
    return {"velocity": out.velocity, **_named(out.tokens)}


def _named(tokens: Tensor | tuple[Tensor, ...]) -> Outputs:
    if isinstance(tokens, (tuple, list)):
        return {f"tokens[{index}]": value for index, value in enumerate(tokens)}
    return {"tokens": tokens}


def _side(subject: Subject) -> int:
    """Return the smallest side in SIDES that the denoiser accepts; if none, the Fault quotes its last error."""
    for side in SIDES:
        try:
            with torch.device("meta"):
                subject.make(LatentShape(4, side, side), CLASSES)
            return side
        except ValueError as error:
            problem = error
    raise Fault(f"accepts no square latent with {', '.join(map(str, SIDES))} positions per side: {problem}")
