"""Checks of denoisers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Tokens
from trainer.plugin_kit.conformance import generic
from trainer.plugin_kit.conformance.adapter import Adapter, Outputs, distance, normal, reaches, shapes
from trainer.plugin_kit.conformance.case import CLASSES, Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute

SIDES = (8, 16, 32, 64)


def checks(case: Case) -> list[Check]:
    case = dataclasses.replace(case, given={"latent": _latent(case)})
    part = case.make()
    adapter = Adapter(
        make=case.make,
        inputs=lambda count: _inputs(part, count, case.given["latent"]),
        call=_outputs,
        may_be_bf16=("velocity", "early", "tokens"),
    )
    own = (
        tokens_match_the_forward_pass,
        depends_on_all_inputs,
        tokens_pass_gradients,
        generic.every_weight_gets_a_gradient,
    )
    of_case = (sets_every_attribute, has_valid_attributes, keeps_shapes, keeps_the_conditions_shapes)
    return bind(case, case, *of_case) + generic.checks(case, adapter, *own)


def has_valid_attributes(case: Case) -> None:
    """align_depth counts from 1, label_dropout is a probability, and null_label is no class."""
    part = case.make()
    if min(_depths(part)) < 1:
        raise Failure(f"align_depth = {part.align_depth}: blocks are counted from 1")
    if not 0 <= part.label_dropout < 1:
        raise Failure(f"label_dropout = {part.label_dropout}: expected a probability in [0, 1)")
    if part.null_label < CLASSES:
        raise Failure(f"null_label = {part.null_label} is one of the {CLASSES} classes; expected num_classes")


def keeps_shapes(case: Case) -> None:
    """Velocities have the shapes of the inputs and tokens are (B, N, width), also for the null label."""
    side = case.given["latent"].height
    for channels, size, count in ((4, side, 1), (3, side, 2), (4, 2 * side, 3)):
        latent = LatentShape(channels, size, size)
        part = case.make(latent=latent).eval()
        x_t, t, condition, noisy = _inputs(part, count, latent)
        where = f"{count} latents of {channels} x {size} x {size}"
        if part.label_dropout:
            condition.label[0] = part.null_label
        out = part(x_t, t, condition, **noisy)
        shapes({"velocity": out.velocity}, (count, *latent), where)
        if part.early_depth:
            shapes({"the early velocity": _early(part, out)}, (count, *latent), where)
        for name, shape in part.noisy_inputs.items():
            shapes({f"the velocity of {name}": out.others[name]}, (count, *shape), where)
        tokens = _named(out.tokens)
        if len(tokens) != len(_depths(part)):
            raise Failure(
                f"returns tokens of {len(tokens)} depths; align_depth = {part.align_depth} lists {len(_depths(part))}"
            )
        vectors = sum(len(shape) == 1 for shape in part.noisy_inputs.values())
        shapes(tokens, (count, part.grid**2 + vectors, part.width), where)


def keeps_the_conditions_shapes(case: Case) -> None:
    """null_condition() returns a condition with the same entries, shapes and dtypes."""
    part = case.make()
    condition = part.example_condition(2)
    null = part.null_condition(condition)
    entries, others = ({"label": c.label, **c.more} for c in (condition, null))
    if entries.keys() != others.keys():
        raise Failure(f"null_condition returns {sorted(others)} for a condition of {sorted(entries)}")
    for name, value in entries.items():
        if others[name].shape != value.shape or others[name].dtype != value.dtype:
            raise Failure(
                f"null_condition returns {name} with shape {tuple(others[name].shape)} and {others[name].dtype}; "
                f"expected {tuple(value.shape)} and {value.dtype}, as in the condition"
            )


def tokens_match_the_forward_pass(adapter: Adapter) -> None:
    """tokens() returns the same tokens as a full forward pass."""
    part, (*inputs, noisy) = adapter.part(), adapter.inputs(2)
    whole, alone = _named(part(*inputs, **noisy).tokens), _named(part.tokens(*inputs, **noisy))
    if whole.keys() != alone.keys() or any(distance(alone[name], whole[name]) > 1e-6 for name in whole):
        raise Failure("tokens() differs from the tokens of a full forward pass: return those after block align_depth")


def depends_on_all_inputs(adapter: Adapter) -> None:
    """The velocity depends on the latents, the time, the condition, and what else is denoised."""
    part, (x_t, t, condition, noisy) = adapter.part(), adapter.inputs(2)
    # A denoiser with further conditions may ignore the label.
    other = part.null_condition(condition) if condition.more else Condition(condition.label + 1)
    changed = {"x_t": (x_t + 1, t, condition, noisy), "t": (x_t, t + 0.2, condition, noisy)}
    changed["the condition"] = x_t, t, other, noisy
    changed |= {name: (x_t, t, condition, noisy | {name: noisy[name] + 1}) for name in noisy}
    velocity = part(x_t, t, condition, **noisy).velocity
    for name, (*inputs, others) in changed.items():
        if torch.equal(part(*inputs, **others).velocity, velocity):
            raise Failure(f"the velocity does not depend on {name}")


def tokens_pass_gradients(adapter: Adapter) -> None:
    """Gradients of tokens() reach the latents through frozen weights, so that alignment trains the tokenizer."""
    part, (x_t, *inputs, noisy) = adapter.part().requires_grad_(False), adapter.inputs(2)
    for name, tokens in _named(part.tokens(x_t.requires_grad_(), *inputs, **noisy)).items():
        # Squared, because after a final norm the gradient of a plain mean is zero.
        if not reaches(tokens.square().mean(), x_t):
            raise Failure(f"{name}: no gradient reaches the latents through tokens() (torch.no_grad() or detach()?)")


def _inputs(part: Denoiser, count: int, latent: LatentShape) -> tuple[Tensor, Tensor, Condition, dict[str, Tensor]]:
    """Return x_t, t, the condition and the noisy inputs of ``count`` images, at most 3."""
    noisy = {name: normal(name, count, *shape) for name, shape in part.noisy_inputs.items()}
    condition = part.example_condition(count)._replace(label=torch.arange(count))
    return normal("latent", count, *latent), torch.tensor([0.2, 0.7, 0.5])[:count], condition, noisy


def _outputs(part: Denoiser, inputs: tuple[Any, ...]) -> Outputs:
    out = part(*inputs[:3], **inputs[3])
    return {
        "velocity": out.velocity,
        **({"early": _early(part, out)} if part.early_depth else {}),
        **{f"velocity of {name}": v for name, v in out.others.items()},
        **_named(out.tokens),
    }


def _early(part: Denoiser, out: DenoiserOutput) -> Tensor:
    if out.early is None:
        raise Failure(f"returns no early prediction, but early_depth = {part.early_depth}")
    return out.early


def _named(tokens: Tokens) -> Outputs:
    if isinstance(tokens, (tuple, list)):
        return {f"tokens[{index}]": value for index, value in enumerate(tokens)}
    return {"tokens": tokens}


def _depths(part: Denoiser) -> list[int]:
    return [part.align_depth] if isinstance(part.align_depth, int) else list(part.align_depth)


def _latent(case: Case) -> LatentShape:
    """Return the smallest latent with a side in SIDES that the denoiser accepts; else the failure quotes its error."""
    for side in SIDES:
        latent = LatentShape(4, side, side)
        try:
            with torch.device("meta"):
                case.make(latent=latent)
            return latent
        except ValueError as error:
            problem = error
    raise Failure(f"accepts no square latent with {', '.join(map(str, SIDES))} positions per side: {problem}")
