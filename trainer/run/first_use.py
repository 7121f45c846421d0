"""Checks what each part of a run returns against its contract, at its first use.

The first step of a start gets modules whose results are checked; later steps get the modules themselves. The checks
stand outside compiled code and FSDP's hooks, and look at types and shapes only, so they also work on fake tensors, on
which ``check`` runs a step.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from components import registry
from components.contracts import DenoiserOutput, LossTerm, Modules, Posterior
from components.registry import PluginError

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
Check = Callable[..., None]


def checked(m: Modules, places: Mapping[str, str]) -> Modules:
    """Copy of ``m`` whose parts check what they return.

    Args:
        m: modules of a run.
        places: tables of the config by module name, for messages.

    Raises:
        PluginError: (when a part is called) names the part, what it returned, and what was expected.
    """

    def wrap(name: str, part: Any, checks: Mapping[str, Check]) -> Any:
        return None if part is None else Checked(part, f"[{places.get(name, name)}] {registry.title(part)}", checks)

    tokenizer, denoiser = m.tokenizer, m.denoiser
    grid = None if denoiser is None else denoiser.grid
    return replace(
        m,
        tokenizer=wrap("tokenizer", tokenizer, _tokenizer(tokenizer)),
        denoiser=wrap("denoiser", denoiser, _denoiser(denoiser)),
        encoders={k: wrap(f"encoders.{k}", e, _encoder(e, grid)) for k, e in m.encoders.items()},
        reconstruction={k: wrap(f"reconstruction.{k}", e, {"forward": _scalar}) for k, e in m.reconstruction.items()},
        discriminator=wrap("discriminator", m.discriminator, {"generator": _scalar, "discriminator": _scalars}),
        alignment=wrap("alignment", m.alignment, {"align": _alignment}),
    )


class Checked:
    """Stands for a part, and checks what some of its methods return.

    Args:
        part: the part; all other attributes are its own.
        title: the part in messages.
        checks: by method; called with a function to report an error, the result, and the method's arguments.
    """

    def __init__(self, part: Any, title: str, checks: Mapping[str, Check]) -> None:
        vars(self).update(_part=part, _title=title, _checks=checks)

    @property
    def __class__(self) -> type:  # isinstance asks it
        return type(self._part)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        return self._checking(name, found) if name in self._checks else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._part, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checking("forward", self._part)(*args, **kwargs)

    def _checking(self, name: str, call: Callable) -> Callable:
        def checking(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if name in self._checks:
                self._checks[name](Report(f"{self._title}: {name}"), result, *args, **kwargs)
            return result

        return checking


class Report:
    """Compares results with what is expected; raises :class:`PluginError` that begins with ``where``."""

    def __init__(self, where: str) -> None:
        self.where = where

    def tensor(self, value: Any, shape: Sequence[int], meaning: str, what: str = "") -> None:
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape) or not value.is_floating_point():
            self.fail(f"{what} {found(value)}".strip(), f"a float tensor {tuple(shape)}, {meaning}")

    def fail(self, got: str, expected: str) -> None:
        raise PluginError(f"{self.where} returns {got}; expected {expected}")


def attribute_fault(part: Any) -> str:
    """The first attribute that the base class of a plugin only annotates and ``part`` lacks or mistypes; "": none."""
    for base in (base for base in type(part).__mro__ if base.__module__.startswith("components.contracts.")):
        for name, annotation in inspect.get_annotations(base, eval_str=True).items():
            if typing.get_origin(annotation) is typing.ClassVar:
                annotation = typing.get_args(annotation)[0]
            where = f"expected {registry.type_name(annotation)}, see components.contracts.{base.__name__}"
            try:
                value = getattr(part, name)
            except AttributeError:
                return f"has no attribute {name}: {where}"
            try:
                TypeAdapter(annotation, config=STRICT).validate_python(value)
            except ValidationError:
                return f"{name} = {value!r} is a {type(value).__name__}; {where}"
    return ""


def found(value: Any) -> str:
    """Describe a value: dtype and shape of a tensor, otherwise its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_terms(recipe: Any, group: str, terms: Mapping[str, Any]) -> None:
    """Check the terms that a recipe passes to ``update``; raises PluginError."""
    where = Report(f"[recipe] {registry.title(recipe)}: update('{group}')")
    for name, term in terms.items():
        if not isinstance(term, LossTerm):
            raise PluginError(f"{where.where} gets {found(term)} as '{name}'; expected LossTerm(weight, value)")
        if not isinstance(term.value, Tensor) or term.value.dim():
            raise PluginError(f"{where.where} gets {found(term.value)} as '{name}'; expected a scalar tensor")


def _tokenizer(part: Any) -> dict[str, Check]:
    def encode(report: Report, posterior: Any, x: Tensor) -> None:
        if not isinstance(posterior, Posterior):
            report.fail(found(posterior), "components.contracts.Posterior(mean, logvar)")
        shape = len(x), part.channels, x.shape[2] // part.factor, x.shape[3] // part.factor
        for name, value in posterior._asdict().items():
            report.tensor(value, shape, "(B, channels, R / factor, R / factor)", name)

    def decode(report: Report, image: Any, z: Tensor) -> None:
        shape = len(z), 3, z.shape[2] * part.factor, z.shape[3] * part.factor
        report.tensor(image, shape, "(B, 3, h * factor, w * factor)")

    return {"encode": encode, "decode": decode}


def _denoiser(part: Any) -> dict[str, Check]:
    def tokens(report: Report, value: Any, x_t: Tensor, *_: Any, **__: Any) -> None:
        single = isinstance(part.align_depth, int)
        count = 1 if single else len(part.align_depth)
        # The token of a vector that is denoised as well, such as REG's class token, precedes the patch tokens.
        vectors = sum(len(shape) == 1 for shape in part.noisy_inputs.values())
        if not (isinstance(value, Tensor) if single else isinstance(value, tuple) and len(value) == count):
            expected = "a tensor" if single else f"a tuple of {count} tensors"
            report.fail(f"tokens as {found(value)}", f"{expected}, as align_depth says")
        for each in (value,) if single else value:
            report.tensor(each, (len(x_t), part.grid**2 + vectors, part.width), "(B, grid * grid, width)", "tokens")

    def forward(report: Report, out: Any, x_t: Tensor, *_: Any, **__: Any) -> None:
        if not isinstance(out, DenoiserOutput):
            report.fail(found(out), "components.contracts.DenoiserOutput(velocity, tokens)")
        report.tensor(out.velocity, x_t.shape, "as x_t", "velocity")
        tokens(report, out.tokens, x_t)
        if part.early_depth:
            report.tensor(out.early, x_t.shape, f"as x_t, since early_depth = {part.early_depth}", "early")
        for name, shape in part.noisy_inputs.items():
            if name not in out.others:
                report.fail(f"others without '{name}'", "the velocity of each of noisy_inputs")
            report.tensor(out.others[name], (len(x_t), *shape), "(B, *noisy_inputs)", name)

    return {"forward": forward, "tokens": tokens}


def _encoder(part: Any, grid: int | None) -> dict[str, Check]:
    def forward(report: Report, tokens: Any, images: Tensor) -> None:
        meaning = "(B, grid * grid, embed_dim), without class and register tokens"
        if not isinstance(tokens, Tensor):
            report.fail(found(tokens), meaning)
        count = grid**2 if grid else tokens[0, ..., 0].numel()
        report.tensor(tokens, (len(images), count, part.embed_dim), meaning)

    def embed(report: Report, vector: Any, images: Tensor) -> None:
        report.tensor(vector, (len(images), part.embed_dim), "(B, embed_dim)")

    return {"forward": forward, "embed": embed}


def _scalar(report: Report, value: Any, *_: Any, **__: Any) -> None:
    report.tensor(value, (), "a scalar")


def _scalars(report: Report, value: Any, *_: Any, **__: Any) -> None:
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, dict) for part in value)):
        report.fail(found(value), "two dicts of scalars: terms of the loss, and values to log")
    for name, each in {**value[1], **value[0]}.items():
        report.tensor(each, (), "a scalar", f"'{name}'")


def _alignment(report: Report, value: Any, projected: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for ours, theirs in zip(projected, targets):
        if ours.shape != theirs.shape:
            raise PluginError(
                f"{report.where} gets projected tokens {tuple(ours.shape)} and targets {tuple(theirs.shape)}; expected "
                "equal shapes (B, N, D): check make_heads, and the recipe's head_dims"
            )
    report.tensor(value, (), "a scalar")
