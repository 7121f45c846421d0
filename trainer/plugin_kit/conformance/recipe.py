"""Checks of recipes, with the parts of templates/run.toml, or those in ``Case.parts``."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from components.contracts import Batch, Condition, Distribution, LossTerm, Modules, RandomNumbers
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.random_numbers import SAMPLERS, draw
from components.distributed.parallel import World
from trainer.config import ConfigError, PluginTable, validate
from trainer.config.load import read_toml
from trainer.plugin_kit import templates
from trainer.plugin_kit.conformance.adapter import images, only_reported, randomize_zeros, scalar
from trainer.plugin_kit.conformance.case import CLASSES, SIDE, Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute
from trainer.run.assemble import prepare
from trainer.run.construct import construct_parts, trained_modules
from trainer.run.parts import Parts

COUNT, STEP = 4, 0
FIELDS = {field.name for field in dataclasses.fields(Modules)}
PARTS = ("tokenizer", "denoiser", "encoders", "losses")
Losses = dict[str, dict[str, LossTerm]]
"""Terms by group."""


def checks(case: Case) -> list[Check]:
    of_class = bind(case, case, sets_every_attribute, declares_its_parts)
    try:
        for check in of_class:
            check.run()
    except Failure:  # modules can be constructed only for sound declarations
        return of_class
    run = Run(case)
    run.parts()
    of_run = (
        declares_its_random_numbers,
        takes_a_step,
        trains_each_group_with_its_own_losses,
        changes_no_module,
        is_deterministic,
        keeps_losses_in_fp32,
        keeps_its_state_in_a_skipped_step,
        samples_images,
        trains_on_cached_latents,
    )
    return of_class + bind(case, run, *of_run)


class Run:
    """A recipe with the parts of a run."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @functools.cached_property
    def _built(self) -> Parts:
        recipe = self.case.make()
        tables = {name: table for name, table in self.case.parts.items() if name in PARTS}
        config = validate(read_toml(str(templates.RUN)) | tables | {"plugins": []}, "--parts")
        config.recipe = PluginTable(name=self.case.plugin.name)
        config.training.precision, config.training.num_classes = "fp64", CLASSES
        try:
            parts = construct_parts(config, recipe=recipe)
        except ConfigError as error:
            raise Failure(f"refuses the parts it is checked with; choose others with --parts: {error}") from error
        prepare(config, parts, World(), files=False)
        for module in parts.modules.named().values():
            randomize_zeros(module)
        parts.reset_copies()
        return parts

    def parts(self) -> Parts:
        """Return a copy of recipe and modules, in fp64 and with modes and requires_grad flags as in training."""
        return copy.deepcopy(self._built)


class Numbers(dict[str, Tensor]):
    """The declared random numbers."""

    def __missing__(self, name: str) -> Tensor:
        raise Failure(f"step uses random['{name}'], which random_numbers() does not declare: {', '.join(self)}")


def declares_its_parts(case: Case) -> None:
    """uses lists fields of Modules, trains maps each group to some of them, and copies names modules in uses."""
    recipe = case.make()
    if wrong := sorted(recipe.uses - FIELDS):
        raise Failure(f"uses must be a frozenset of fields of components.contracts.Modules; not fields: {wrong}")
    if not recipe.trains:
        raise Failure("trains is empty; expected a dict: group -> names of the modules that the group updates")
    for group, members in recipe.trains.items():
        if not members or not set(members) <= recipe.uses:
            raise Failure(f"trains['{group}'] = {members!r}: expected a tuple of names in uses")
    names = [name for members in recipe.trains.values() for name in members]
    if again := {name for name in names if names.count(name) > 1}:
        raise Failure(f"{sorted(again)} are in several groups; a module belongs to exactly one optimizer")
    for name, source in recipe.copies.items():
        if source.split(".")[0] not in recipe.uses:
            raise Failure(f"copies['{name}'] = '{source}': expected the name of a module in uses")


def declares_its_random_numbers(run: Run) -> None:
    """random_numbers() returns a Distribution per name, with a shape per image."""
    for name, declared in run.parts().random_numbers.items():
        if not isinstance(declared, Distribution):
            raise Failure(
                f"random_numbers()['{name}'] is a {type(declared).__name__}; expected components.contracts.Distribution"
            )
        if declared.kind not in SAMPLERS or not all(isinstance(size, int) for size in declared.shape):
            raise Failure(f"random_numbers()['{name}'] = {declared}: expected a kind of {', '.join(SAMPLERS)} and ints")


def takes_a_step(run: Run) -> None:
    """A step calls update for every group with named, weighted, finite terms; reported scalars carry no graph."""
    parts = run.parts()
    losses, reported = _step(parts)
    if losses.keys() != parts.recipe.trains.keys():
        raise Failure(f"step updates the groups {sorted(losses)}, but trains lists {sorted(parts.recipe.trains)}")
    for group, terms in losses.items():
        if not terms:
            raise Failure(f"update('{group}', ...) is called without terms")
    for name, term in _terms(losses):
        if not isinstance(term, LossTerm):
            raise Failure(f"{name} is a {type(term).__name__}; expected components.contracts.LossTerm")
        scalar(term.value, name)
        if not isinstance(term.weight, (int, float)):
            raise Failure(f"the weight of {name} is a {type(term.weight).__name__}, not a number")
    only_reported(reported)


def trains_each_group_with_its_own_losses(run: Run) -> None:
    """The update of a group sends gradients into all modules of that group and no others."""
    for group, members in run.parts().recipe.trains.items():
        parts = run.parts()
        _step(parts, only=group)
        weights = _weights(parts.modules)
        reached = {name.split(".")[0] for name, p in weights if p.grad is not None and p.grad.any()}
        if leaked := sorted(reached - set(members)):
            raise Failure(
                f"the update of '{group}' sends gradients into {', '.join(leaked)} (missing detach() or "
                "components.distributed.freeze.frozen(...)?)"
            )
        if missed := sorted(set(members) - reached):
            raise Failure(f"the update of '{group}' sends no gradient into {', '.join(missed)}")


def changes_no_module(run: Run) -> None:
    """A step changes no weight, no train/eval mode and no requires_grad flag; optimizers step later, if at all."""
    parts = run.parts()
    m = parts.modules
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in _weights(m)}
    modes = {name: module.training for name, module in m.named().items()}
    _step(parts)
    for name, p in _weights(m):
        value, requires_grad = before[name]
        if not torch.equal(p, value):
            raise Failure(f"step changes the weight {name}; pass losses to update instead, optimizers step later")
        if p.requires_grad != requires_grad:
            raise Failure(f"step does not restore requires_grad of {name}; use components.distributed.freeze.frozen")
    for name, module in m.named().items():
        if module.training != modes[name]:
            raise Failure(f"step changes the mode (train or eval) of {name}")


def is_deterministic(run: Run) -> None:
    """The same weights, images and random numbers produce the same losses, and no other random numbers are drawn."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            parts = run.parts()
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            found.append(_values(_step(parts)[0]))
            if not torch.equal(before, torch.random.get_rng_state()):
                raise Failure(
                    "step draws random numbers, which would differ between ranks; declare them in random_numbers()"
                )
    if changed := [name for name in found[0] if found[0][name] != found[1][name]]:
        raise Failure(f"two steps with the same weights, images and random numbers differ in {', '.join(changed)}")


def keeps_losses_in_fp32(run: Run) -> None:
    """Under bf16 autocast every term is finite and fp32."""
    parts = run.parts()
    for module in parts.modules.named().values():
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = _step(parts, dtype=torch.float32)
    for name, term in _terms(losses):
        scalar(term.value, f"under bf16 autocast, {name}")
        if term.value.dtype != torch.float32:
            raise Failure(
                f"{name} is {term.value.dtype} under bf16 autocast; compute it from "
                "components.nn.precision.at_least_fp32(input)"
            )


def keeps_its_state_in_a_skipped_step(run: Run) -> None:
    """State consists of tensors, and after_step() changes neither state nor copies if the step is not finite."""
    parts = run.parts()
    m = parts.modules
    if wrong := [name for name, value in m.state.items() if not isinstance(value, Tensor)]:
        raise Failure(f"init_state()['{wrong[0]}'] is a {type(m.state[wrong[0]]).__name__}; expected a tensor")
    _step(parts)
    for p in (p for _, p in _weights(m) if p.requires_grad):
        p.detach().mul_(0.9)  # as by optimizers, so that copies and their sources differ
    before = copy.deepcopy(_kept(m))
    parts.recipe.after_step(m, torch.tensor(False), STEP)
    if changed := [name for name, value in _kept(m).items() if not torch.equal(value, before[name])]:
        raise Failure(
            f"after_step() changes {changed[0]} of a skipped step; where finite is false, keep the old value: "
            "torch.where(finite, new, old)"
        )


def samples_images(run: Run) -> None:
    """What it denoises matches the denoiser, and images can be sampled with its samplers."""
    parts = run.parts()
    m = parts.modules
    if "denoiser" not in parts.recipe.uses:
        return
    if wrong := {k: v for k, v in parts.recipe.denoised(m).items() if m.denoiser.noisy_inputs.get(k) != v}:
        raise Failure(f"denoised() returns {wrong}, but the denoiser takes {m.denoiser.noisy_inputs}")
    for method in ("euler", *parts.recipe.samplers):
        sampler = ImageSampler(SamplingPlan(method, steps=2), parts.recipe, m, parts.latent)
        found = sampler([0, 1], _condition(m, 2))
        if found.shape != (2, 3, SIDE, SIDE) or not found.isfinite().all():
            raise Failure(f"sampling.method = '{method}' returns images of shape {tuple(found.shape)} or not finite")


def trains_on_cached_latents(run: Run) -> None:
    """With cached_latents = True, a step on cached latents has the same losses as one on images."""
    parts = run.parts()
    m = parts.modules
    if not parts.recipe.cached_latents:
        return
    if "tokenizer" in trained_modules(parts.recipe):
        raise Failure("sets cached_latents = True, but trains the tokenizer")
    batch = _batch(m)
    with torch.no_grad():
        posterior = m.tokenizer.encode(batch.images)
        features = {label: encoder(batch.images) for label, encoder in m.encoders.items()}
    expected = _values(_step(parts)[0])
    try:
        cached = _values(_step(run.parts(), Batch(None, batch.condition, posterior, features))[0])
    except (AttributeError, TypeError) as error:
        raise Failure(f"sets cached_latents = True, but fails on a batch without images: {error}") from error
    if changed := [name for name in expected if not abs(expected[name] - cached.get(name, float("nan"))) <= 1e-9]:
        raise Failure(f"sets cached_latents = True, but cached latents change {', '.join(changed)}")


def _condition(m: Modules, count: int) -> Condition:
    condition = Condition(torch.arange(count) % CLASSES)
    return condition if m.denoiser is None else m.denoiser.example_condition(count)._replace(label=condition.label)


def _batch(m: Modules, dtype: torch.dtype = torch.float64) -> Batch:
    return Batch(images(COUNT, SIDE).to(dtype), _condition(m, COUNT))


def _step(
    parts: Parts, batch: Batch | None = None, only: str | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Losses, dict[str, Tensor]]:
    """Run a step with the declared random numbers and backpropagate the updates of group ``only`` (None: all groups).

    Returns:
        Terms by group, and values that were only reported.
    """
    losses: Losses = {}
    reported: dict[str, Tensor] = {}

    def update(group: str, terms: dict[str, LossTerm], **extra: Tensor) -> None:
        values = [weight * value for weight, value in terms.values()]
        if only in (None, group) and any(value.requires_grad for value in values):
            sum(values).backward()
        losses.setdefault(group, {}).update(terms)
        reported.update(extra)

    drawn: RandomNumbers = draw(0, STEP, range(COUNT), COUNT, parts.random_numbers)
    numbers = Numbers({name: value.to(dtype) for name, value in drawn.items()})
    parts.recipe.step(parts.modules, batch or _batch(parts.modules, dtype), numbers, update, STEP)
    return losses, reported


def _terms(losses: Losses) -> Iterator[tuple[str, LossTerm]]:
    for group, terms in losses.items():
        for name, term in terms.items():
            yield f"term {name} of '{group}'", term


def _values(losses: Losses) -> dict[str, float]:
    return {name: term.value.item() for name, term in _terms(losses)}


def _weights(m: Modules) -> list[tuple[str, nn.Parameter]]:
    return [(f"{place}.{name}", p) for place, module in m.named().items() for name, p in module.named_parameters()]


def _kept(m: Modules) -> dict[str, Any]:
    copies = nn.ModuleDict(m.copies).state_dict()
    return {f"copies.{name}": value for name, value in copies.items()} | {f"state.{k}": v for k, v in m.state.items()}
