"""Checks of denoisers."""

from __future__ import annotations

from typing import Any

import torch

from components.contracts import LatentShape, Tokens
from trainer.plugin_kit.conformance import generic
from trainer.plugin_kit.conformance.adapter import (
    Adapter,
    Attributes,
    Inputs,
    Outputs,
    distance,
    normal,
    reaches,
    require,
    shapes,
)
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind

CLASSES = 10
SIDES = (8, 16, 32, 64)
ATTRIBUTES: Attributes = {
    "width": (int, "features of a hidden token"),
    "grid": (int, "tokens per side"),
    "align_depth": ((int, list, tuple), "block whose tokens are aligned, counted from 1"),
    "null_label": (int, "label that means no class"),
    "label_dropout": ((float, int), "probability of the null label in training"),
}


def checks(case: Case) -> list[Check]:
    side = _side(case)
    adapter = Adapter(
        make=lambda seed: case.make(LatentShape(4, side, side), CLASSES, seed=seed),
        inputs=lambda count: _inputs(count, 4, side),
        call=_outputs,
        methods=("tokens",),
        may_be_bf16=("velocity", "tokens"),
    )
    own = (
        tokens_match_the_forward_pass,
        depends_on_all_inputs,
        tokens_pass_gradients,
        generic.every_weight_gets_a_gradient,
    )
    return bind(case, case, has_attributes, keeps_shapes) + generic.checks(case, adapter, *own)


def has_attributes(case: Case) -> None:
    """The denoiser is an nn.Module with width, grid, align_depth, null_label and label_dropout."""
    side = _side(case)
    part = case.make(LatentShape(4, side, side), CLASSES)
    require(part, ATTRIBUTES, methods=("tokens", "units"), module=True)
    if min(_depths(part)) < 1:
        raise Failure(f"align_depth = {part.align_depth}: blocks are counted from 1")
    if not 0 <= part.label_dropout < 1:
        raise Failure(f"label_dropout = {part.label_dropout}: expected a probability in [0, 1)")
    if part.null_label < CLASSES:
        raise Failure(f"null_label = {part.null_label} is one of the {CLASSES} classes; expected num_classes")


def keeps_shapes(case: Case) -> None:
    """The velocity has the latent's shape and tokens are (B, grid * grid, width), also for the null label."""
    side = _side(case)
    for channels, size, count in ((4, side, 1), (3, side, 2), (4, 2 * side, 3)):
        part = case.make(LatentShape(channels, size, size), CLASSES).eval()
        x_t, t, labels = _inputs(count, channels, size)
        where = f"{count} latents of {channels} x {size} x {size}"
        if part.label_dropout:
            labels[0] = part.null_label
        out = part(x_t, t, labels)
        if not hasattr(out, "velocity") or not hasattr(out, "tokens"):
            raise Failure(f"returns a {type(out).__name__}; expected components.contracts.DenoiserOutput")
        shapes({"velocity": out.velocity}, (count, channels, size, size), where)
        tokens = _named(out.tokens)
        if len(tokens) != len(_depths(part)):
            raise Failure(
                f"returns tokens of {len(tokens)} depths; align_depth = {part.align_depth} lists {len(_depths(part))}"
            )
        shapes(tokens, (count, part.grid**2, part.width), where)


def tokens_match_the_forward_pass(adapter: Adapter) -> None:
    """tokens() returns the same tokens as a full forward pass."""
    part, inputs = adapter.part(), adapter.inputs(2)
    whole, alone = _named(part(*inputs).tokens), _named(part.tokens(*inputs))
    if whole.keys() != alone.keys() or any(distance(alone[name], whole[name]) > 1e-6 for name in whole):
        raise Failure("tokens() differs from the tokens of a full forward pass: return those after block align_depth")


def depends_on_all_inputs(adapter: Adapter) -> None:
    """The velocity depends on the latents, the time and the label."""
    part, inputs = adapter.part(), adapter.inputs(2)
    velocity = part(*inputs).velocity
    for index, (name, change) in enumerate((("x_t", 1), ("t", 0.2), ("labels", 1))):
        changed = [x + change if i == index else x for i, x in enumerate(inputs)]
        if torch.equal(part(*changed).velocity, velocity):
            raise Failure(f"the velocity does not depend on {name}")


def tokens_pass_gradients(adapter: Adapter) -> None:
    """Gradients of tokens() reach the latents through frozen weights, so that alignment trains the tokenizer."""
    part, (x_t, t, labels) = adapter.part().requires_grad_(False), adapter.inputs(2)
    x_t.requires_grad_()
    for name, tokens in _named(part.tokens(x_t, t, labels)).items():
        # Squared, because after a final norm the gradient of a plain mean is zero.
        if not reaches(tokens.square().mean(), x_t):
            raise Failure(f"{name}: no gradient reaches the latents through tokens() (torch.no_grad() or detach()?)")


def _inputs(count: int, channels: int, side: int) -> Inputs:
    """Return x_t (count, channels, side, side), t (count,) and labels (count,); count is at most 3."""
    return normal("latent", count, channels, side, side), torch.tensor([0.2, 0.7, 0.5])[:count], torch.arange(count)


def _outputs(part: Any, inputs: Inputs) -> Outputs:
    out = part(*inputs)
    return {"velocity": out.velocity, **_named(out.tokens)}


def _named(tokens: Tokens) -> Outputs:
    if isinstance(tokens, (tuple, list)):
        return {f"tokens[{index}]": value for index, value in enumerate(tokens)}
    return {"tokens": tokens}


def _depths(part: Any) -> list[int]:
    return [part.align_depth] if isinstance(part.align_depth, int) else list(part.align_depth)


def _side(case: Case) -> int:
    """Return the smallest side in SIDES that the denoiser accepts; if none, the failure quotes its last error."""
    for side in SIDES:
        try:
            with torch.device("meta"):
                case.make(LatentShape(4, side, side), CLASSES)
            return side
        except ValueError as error:
            problem = error
    raise Failure(f"accepts no square latent with {', '.join(map(str, SIDES))} positions per side: {problem}")
