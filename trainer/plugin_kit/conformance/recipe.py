"""Checks of recipes, with the parts of templates/run.toml, or those in ``Case.parts``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from components import registry
from components.contracts import AdversarialLoss, AlignmentLoss, Batch, Draws, LatentShape, LossTerm, Modules
from components.diffusion.flow import Flow
from components.diffusion.random_numbers import draw
from components.nn.latent_norm import LatentNorm
from trainer.config.load import read_toml
from trainer.plugin_kit import templates
from trainer.plugin_kit.conformance.adapter import images, only_reported, randomize_zeros, require, scalar
from trainer.plugin_kit.conformance.case import Case, Check, Failure, bind

SIDE, CLASSES, COUNT, STEP = 32, 10, 4, 0
FIELDS = {field.name for field in dataclasses.fields(Modules)}
ATTRIBUTES = {
    "uses": (frozenset, "fields of components.contracts.Modules"),
    "trains": (dict, "names of the modules that each group updates"),
}
Losses = dict[str, dict[str, LossTerm]]
"""Terms by group."""


def checks(case: Case) -> list[Check]:
    case.make()
    return bind(
        case,
        case,
        declares_its_parts,
        takes_a_step,
        trains_each_group_with_its_own_losses,
        changes_no_module,
        is_deterministic,
        keeps_losses_in_fp32,
        trains_on_cached_latents,
    )


def declares_its_parts(case: Case) -> None:
    """uses lists fields of Modules, and trains maps each group to some of them."""
    recipe = case.make()
    require(recipe, ATTRIBUTES, methods=("step",))
    if wrong := sorted(recipe.uses - FIELDS):
        raise Failure(f"uses must be a frozenset of fields of components.contracts.Modules; not fields: {wrong}")
    if not recipe.trains:
        raise Failure("trains is empty; expected a dict: group -> names of the modules that the group updates")
    for group, members in recipe.trains.items():
        if isinstance(members, str) or not members or not set(members) <= recipe.uses:
            raise Failure(f"trains['{group}'] = {members!r}: expected a tuple of names in uses")
    names = [name for members in recipe.trains.values() for name in members]
    if again := {name for name in names if names.count(name) > 1}:
        raise Failure(f"{sorted(again)} are in several groups; a module belongs to exactly one optimizer")


def takes_a_step(case: Case) -> None:
    """A step calls update for every group with named, weighted, finite terms; reported scalars carry no graph."""
    recipe, m = _build(case)
    losses, reported = _step(recipe, m, *_batch(m))
    if losses.keys() != recipe.trains.keys():
        raise Failure(f"step updates the groups {sorted(losses)}, but trains lists {sorted(recipe.trains)}")
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


def trains_each_group_with_its_own_losses(case: Case) -> None:
    """The update of a group sends gradients into all modules of that group and no others."""
    for group, members in case.make().trains.items():
        recipe, m = _build(case)
        _step(recipe, m, *_batch(m), only=group)
        reached = {name.split(".")[0] for name, p in _weights(m) if p.grad is not None and p.grad.any()}
        if leaked := sorted(reached - set(members)):
            raise Failure(
                f"the update of '{group}' sends gradients into {', '.join(leaked)} (missing detach() or "
                "components.distributed.freeze.frozen(...)?)"
            )
        if missed := sorted(set(members) - reached):
            raise Failure(f"the update of '{group}' sends no gradient into {', '.join(missed)}")


def changes_no_module(case: Case) -> None:
    """A step changes no weight, no train/eval mode and no requires_grad flag; optimizers step later, if at all."""
    recipe, m = _build(case)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in _weights(m)}
    modes = {name: module.training for name, module in m.named().items()}
    _step(recipe, m, *_batch(m))
    for name, p in _weights(m):
        value, requires_grad = before[name]
        if not torch.equal(p, value):
            raise Failure(f"step changes the weight {name}; pass losses to update instead, optimizers step later")
        if p.requires_grad != requires_grad:
            raise Failure(f"step does not restore requires_grad of {name}; use components.distributed.freeze.frozen")
    for name, module in m.named().items():
        if module.training != modes[name]:
            raise Failure(f"step changes the mode (train or eval) of {name}")


def is_deterministic(case: Case) -> None:
    """The same weights, images and draws produce the same losses, and no other random numbers are drawn."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            recipe, m = _build(case)
            batch = _batch(m)
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            found.append(_values(_step(recipe, m, *batch)[0]))
            if not torch.equal(before, torch.random.get_rng_state()):
                raise Failure("step draws random numbers, which would differ between ranks; use draws instead")
    if changed := [name for name in found[0] if found[0][name] != found[1][name]]:
        raise Failure(f"two steps with the same weights, images and draws differ in {', '.join(changed)}")


def keeps_losses_in_fp32(case: Case) -> None:
    """Under bf16 autocast every term is finite and fp32."""
    recipe, m = _build(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = _step(recipe, m, *_batch(m, torch.float32))
    for name, term in _terms(losses):
        scalar(term.value, f"under bf16 autocast, {name}")
        if term.value.dtype != torch.float32:
            raise Failure(
                f"{name} is {term.value.dtype} under bf16 autocast; compute it from "
                "components.nn.precision.at_least_fp32(input)"
            )


def trains_on_cached_latents(case: Case) -> None:
    """With cached_latents = True, a step on cached latents has the same losses as one on images."""
    recipe, m = _build(case)
    if not getattr(recipe, "cached_latents", False):
        return
    if any("tokenizer" in members for members in recipe.trains.values()):
        raise Failure("sets cached_latents = True, but trains the tokenizer")
    batch, draws = _batch(m)
    with torch.no_grad():
        posterior = m.tokenizer.encode(batch.images)
        features = {label: encoder(batch.images) for label, encoder in m.encoders.items()}
    expected = _values(_step(recipe, m, batch, draws)[0])
    recipe, m = _build(case)
    try:
        cached = _values(_step(recipe, m, Batch(None, batch.labels, posterior, features), draws)[0])
    except (AttributeError, TypeError) as error:
        raise Failure(f"sets cached_latents = True, but fails on a batch without images: {error}") from error
    if changed := [name for name in expected if not abs(expected[name] - cached.get(name, float("nan"))) <= 1e-9]:
        raise Failure(f"sets cached_latents = True, but cached latents change {', '.join(changed)}")


def _build(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, Modules]:
    """Construct the recipe, and its parts with modes and requires_grad flags as in training."""
    recipe = case.make()
    m = Modules(**_parts(case.parts, recipe.uses), flow=Flow())
    trained = {name for members in recipe.trains.values() for name in members}
    for name, module in m.named().items():
        learns = name.split(".")[0] in trained
        module.to(dtype).train(learns).requires_grad_(learns)
        randomize_zeros(module)
    if hasattr(recipe, "check"):
        try:
            recipe.check(m)
        except ValueError as error:
            raise Failure(f"refuses the parts it is checked with; choose others with --parts: {error}") from error
    return recipe, m


def _parts(tables: dict[str, Any], uses: frozenset[str]) -> dict[str, Any]:
    """Construct the fields of :class:`Modules` in ``uses``, from ``tables`` and, for what they lack, run.toml."""
    usual = read_toml(str(templates.RUN))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _plugin("tokenizer", tables.get("tokenizer") or usual["tokenizer"])
        latent = LatentShape(tokenizer.channels, *[SIDE // tokenizer.factor] * 2)
        denoiser = _plugin("denoiser", tables.get("denoiser") or usual["denoiser"], latent, CLASSES)
        encoders = _plugins("encoder", tables.get("encoders") or usual["encoders"], SIDE, denoiser.grid)
        own, other = (_sort(_plugins("loss", source.get("losses", {}))) for source in (tables, usual))
        losses = {field: own[field] or other[field] for field in other}
        alignment = next(iter(losses["alignment"].values()))
        depths = 1 if isinstance(denoiser.align_depth, int) else len(denoiser.align_depth)
        dims = [encoder.embed_dim for encoder in encoders.values()] * depths
        parts = {
            "tokenizer": tokenizer,
            "denoiser": denoiser,
            "latent_norm": LatentNorm(latent.channels),
            "encoders": encoders,
            "reconstruction": losses["reconstruction"],
            "discriminator": next(iter(losses["discriminator"].values())),
            "alignment": alignment,
            "heads": alignment.make_heads(denoiser.width, dims, denoiser.grid),
        }
    return {name: part for name, part in parts.items() if name in uses}


def _plugins(kind: str, tables: dict[str, Any], *given: Any) -> dict[str, Any]:
    return {label: _plugin(kind, {"name": label} | table, *given) for label, table in tables.items()}


def _plugin(kind: str, table: dict[str, Any], *given: Any) -> Any:
    options = {key: value for key, value in table.items() if key != "name"}
    return registry.KINDS[kind].get(table.get("name", "")).cls(*given, **options)


def _sort(losses: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return losses by the field of :class:`Modules` that they belong to."""
    found: dict[str, dict[str, Any]] = {"alignment": {}, "discriminator": {}, "reconstruction": {}}
    for label, loss in losses.items():
        adversarial = "discriminator" if isinstance(loss, AdversarialLoss) else "reconstruction"
        found["alignment" if isinstance(loss, AlignmentLoss) else adversarial][label] = loss
    return found


def _batch(m: Modules, dtype: torch.dtype = torch.float64) -> tuple[Batch, Draws]:
    channels, factor = (m.tokenizer.channels, m.tokenizer.factor) if m.tokenizer is not None else (4, 4)
    latent = LatentShape(channels, SIDE // factor, SIDE // factor)
    draws = draw(0, STEP, range(COUNT), COUNT, latent, getattr(m.denoiser, "extra_dim", 0))
    batch = Batch(images(COUNT, SIDE).to(dtype), torch.arange(COUNT) % CLASSES)
    return batch, Draws(*(value.to(dtype) for value in draws))


def _step(
    recipe: Any, m: Modules, batch: Batch, draws: Draws, only: str | None = None
) -> tuple[Losses, dict[str, Tensor]]:
    """Run a step and backpropagate the updates of group ``only`` (None: all groups).

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

    recipe.step(m, batch, draws, update, STEP)
    return losses, reported


def _terms(losses: Losses) -> Iterator[tuple[str, LossTerm]]:
    for group, terms in losses.items():
        for name, term in terms.items():
            yield f"term {name} of '{group}'", term


def _values(losses: Losses) -> dict[str, float]:
    return {name: term.value.item() for name, term in _terms(losses)}


def _weights(m: Modules) -> list[tuple[str, nn.Parameter]]:
    return [(f"{place}.{name}", p) for place, module in m.named().items() for name, p in module.named_parameters()]
