"""Checks of recipes, with small toy parts or those in ``Subject.parts``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from components import registry
from components.contracts import AdversarialLoss, AlignmentLoss, Batch, Draws, LatentShape, LossTerm, Modules
from components.diffusion.flow import Flow
from components.diffusion.random_numbers import draw
from components.nn.latent_norm import LatentNorm
from trainer.plugin_kit.conformance import toys
from trainer.plugin_kit.conformance.form import images, stir
from trainer.plugin_kit.conformance.form_checks import scalar
from trainer.plugin_kit.conformance.subject import Fault, Subject

SIDE, CLASSES, COUNT, STEP = 32, 10, 4, 0
FIELDS = {field.name for field in dataclasses.fields(Modules)}
Seen = dict[str, dict[str, LossTerm]]


def checks(subject: Subject) -> list:
    subject.make()
    return [
        states_its_parts,
        takes_a_step,
        teaches_each_group_from_its_own_losses,
        leaves_everything_as_it_found_it,
        repeats_itself,
        keeps_losses_in_fp32,
        trains_on_cached_latents,
    ]


def states_its_parts(subject: Subject) -> None:
    """uses lists fields of Modules, and trains maps each group to some of them."""
    recipe = subject.make()
    for name in ("uses", "trains"):
        if not hasattr(recipe, name):
            raise Fault(f"has no attribute {name}")
    if not isinstance(recipe.uses, frozenset) or not recipe.uses <= FIELDS:
        wrong = sorted(set(recipe.uses) - FIELDS)
        raise Fault(f"uses must be a frozenset of fields of components.contracts.Modules; not fields: {wrong}")
    if not isinstance(recipe.trains, dict) or not recipe.trains:
        raise Fault("trains must be a dict: group -> names of the modules that the group updates")
    for group, members in recipe.trains.items():
        if isinstance(members, str) or not members or not set(members) <= recipe.uses:
            raise Fault(f"trains['{group}'] = {members!r}: expected a tuple of names in uses")
    twice = [name for members in recipe.trains.values() for name in members]
    if again := {name for name in twice if twice.count(name) > 1}:
        raise Fault(f"{sorted(again)} are in several groups; a module belongs to exactly one optimizer")


def takes_a_step(subject: Subject) -> None:
    """A step calls update for every group with named, weighted, finite terms; reported scalars carry no graph."""
    recipe, m = _made(subject)
    seen, reported = _step(recipe, m, *_batch(m))
    if seen.keys() != recipe.trains.keys():
        raise Fault(f"step updates the groups {sorted(seen)}, but trains lists {sorted(recipe.trains)}")
    for group, terms in seen.items():
        if not terms:
            raise Fault(f"update('{group}', ...) is called without terms")
        for name, term in terms.items():
            if not isinstance(term, LossTerm):
                raise Fault(f"term {name} of '{group}' is a {type(term).__name__}; expected contracts.LossTerm")
            scalar(term.value, f"term {name} of '{group}'")
            if not isinstance(term.weight, (int, float)):
                raise Fault(f"the weight of term {name} of '{group}' is a {type(term.weight).__name__}, not a number")
    for name, value in reported.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise Fault(f"{name} is only reported, but carries a gradient; detach it")


def teaches_each_group_from_its_own_losses(subject: Subject) -> None:
    """The update of a group sends gradients into all modules of that group and no others."""
    groups = subject.make().trains
    for group, members in groups.items():
        recipe, m = _made(subject)
        _step(recipe, m, *_batch(m), only=group)
        reached = {
            name
            for name, module in m.named().items()
            if any(p.grad is not None and p.grad.any() for p in module.parameters())
        }
        named = {name.split(".")[0] for name in reached}
        if leaked := named - set(members):
            raise Fault(
                f"the update of '{group}' sends gradients into {', '.join(sorted(leaked))} (missing detach() or "
                "components.distributed.freeze.frozen(...)?)"
            )
        if missed := set(members) - named:
            raise Fault(f"the update of '{group}' sends no gradient into {', '.join(sorted(missed))}")


def leaves_everything_as_it_found_it(subject: Subject) -> None:
    """A step changes no weight, no train/eval mode and no requires_grad flag; optimizers step later, if at all."""
    recipe, m = _made(subject)
    before = {name: p.detach().clone() for name, p in _weights(m)}
    flags = {name: p.requires_grad for name, p in _weights(m)}
    modes = {name: module.training for name, module in m.named().items()}
    _step(recipe, m, *_batch(m))
    for name, p in _weights(m):
        if not torch.equal(p, before[name]):
            raise Fault(f"step changes the weight {name}; pass losses to update instead, optimizers step later")
        if p.requires_grad != flags[name]:
            raise Fault(f"step does not restore requires_grad of {name}; use components.distributed.freeze.frozen")
    for name, module in m.named().items():
        if module.training != modes[name]:
            raise Fault(f"step changes the mode (train or eval) of {name}")


def repeats_itself(subject: Subject) -> None:
    """The same weights, images and draws produce the same losses, and no other random numbers are drawn."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            recipe, m = _made(subject)
            batch = _batch(m)
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            found.append(_values(_step(recipe, m, *batch)[0]))
            if not torch.equal(before, torch.random.get_rng_state()):
                raise Fault("step draws random numbers, which would differ between ranks; use draws instead")
    if changed := [name for name in found[0] if found[0][name] != found[1][name]]:
        raise Fault(f"two steps with the same weights, images and draws differ in {', '.join(changed)}")


def keeps_losses_in_fp32(subject: Subject) -> None:
    """Under bf16 autocast every term is finite and fp32."""
    recipe, m = _made(subject, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen, _ = _step(recipe, m, *_batch(m, torch.float32))
    for group, terms in seen.items():
        for name, term in terms.items():
            scalar(term.value, f"under bf16 autocast, term {name} of '{group}'")
            if term.value.dtype != torch.float32:
                raise Fault(
                    f"term {name} of '{group}' is {term.value.dtype} under bf16 autocast; compute it from "
                    "components.nn.precision.at_least_fp32(input)"
                )


def trains_on_cached_latents(subject: Subject) -> None:
    """With cached_latents = True, a step on cached latents has the same losses as one on images."""
    recipe, m = _made(subject)
    if not getattr(recipe, "cached_latents", False):
        return
    if "tokenizer" in {name for members in recipe.trains.values() for name in members}:
        raise Fault("sets cached_latents = True, but trains the tokenizer")
    batch, draws = _batch(m)
    with torch.no_grad():
        posterior = m.tokenizer.encode(batch.images)
        features = {label: encoder(batch.images) for label, encoder in m.encoders.items()}
    usual = _values(_step(recipe, m, batch, draws)[0])
    recipe, m = _made(subject)
    try:
        cached = _values(_step(recipe, m, Batch(None, batch.labels, posterior, features), draws)[0])
    except (AttributeError, TypeError) as error:
        raise Fault(f"sets cached_latents = True, but fails on a batch without images: {error}") from error
    if changed := [name for name in usual if abs(usual[name] - cached.get(name, float("nan"))) > 1e-9]:
        raise Fault(f"sets cached_latents = True, but cached latents change {', '.join(changed)}")


def _made(subject: Subject, dtype: torch.dtype = torch.float64) -> tuple[Any, Modules]:
    """Construct the recipe, and its parts with modes and requires_grad flags as in training."""
    recipe = subject.make()
    m = Modules(**_parts(subject.parts, recipe.uses), flow=Flow())
    trained = {name for members in recipe.trains.values() for name in members}
    for name, module in m.named().items():
        learns = name.split(".")[0] in trained
        module.to(dtype).train(learns).requires_grad_(learns)
        stir(module)
    if hasattr(recipe, "check"):
        try:
            recipe.check(m)
        except ValueError as error:
            raise Fault(f"refuses the parts it is checked with; choose others with --parts: {error}") from error
    return recipe, m


def _parts(tables: dict[str, Any], uses: frozenset[str]) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: dict[str, Any] = {"tokenizer": _plugin("tokenizer", tables.get("tokenizer"), toys.ToyTokenizer)}
        latent = LatentShape(found["tokenizer"].channels, *[SIDE // found["tokenizer"].factor] * 2)
        denoiser = _plugin("denoiser", tables.get("denoiser"), toys.ToyDenoiser, latent, CLASSES)
        encoders = {
            label: _plugin("encoder", table and {"name": label} | table, toys.ToyEncoder, SIDE, denoiser.grid)
            for label, table in (tables.get("encoders") or {"toy": None}).items()
        }
        losses = {
            label: _plugin("loss", {"name": label} | table, None) for label, table in tables.get("losses", {}).items()
        }
        alignment = [x for x in losses.values() if isinstance(x, AlignmentLoss)] or [toys.ToyAlignment()]
        adversary = [x for x in losses.values() if isinstance(x, AdversarialLoss)] or [toys.ToyAdversary()]
        terms = {k: x for k, x in losses.items() if not isinstance(x, (AlignmentLoss, AdversarialLoss))}
        depths = len(denoiser.align_depth) if isinstance(denoiser.align_depth, (list, tuple)) else 1
        dims = [encoder.embed_dim for encoder in encoders.values()] * depths
        found |= {
            "denoiser": denoiser,
            "latent_norm": LatentNorm(latent.channels),
            "encoders": encoders,
            "reconstruction": terms or {"l1": toys.ToyL1()},
            "discriminator": adversary[0],
            "alignment": alignment[0],
            "heads": alignment[0].make_heads(denoiser.width, dims, denoiser.grid),
        }
    return {name: part for name, part in found.items() if name in uses}


def _plugin(kind: str, table: dict[str, Any] | None, own: Callable | None, *given: Any) -> Any:
    if not table:
        return own(*given)
    options = {key: value for key, value in table.items() if key != "name"}
    return registry.KINDS[kind].get(table.get("name", "")).cls(*given, **options)


def _batch(m: Modules, dtype: torch.dtype = torch.float64) -> tuple[Batch, Draws]:
    x = images(COUNT, SIDE).to(dtype)
    side = SIDE // m.tokenizer.factor if m.tokenizer is not None else 8
    channels = m.tokenizer.channels if m.tokenizer is not None else 4
    extra_dim = getattr(m.denoiser, "extra_dim", 0)
    draws = draw(0, STEP, range(COUNT), COUNT, LatentShape(channels, side, side), extra_dim)
    return Batch(x, torch.arange(COUNT) % CLASSES), Draws(*(value.to(dtype) for value in draws))


def _step(
    recipe: Any, m: Modules, batch: Batch, draws: Draws, only: str | None = None
) -> tuple[Seen, dict[str, Tensor]]:
    """Run a step and backpropagate the updates of group ``only`` (None: all groups).

    Returns:
        Terms by group, and values that were only reported.
    """
    seen: Seen = {}
    reported: dict[str, Tensor] = {}

    def update(group: str, terms: dict[str, LossTerm], **extra: Tensor) -> None:
        if only in (None, group):
            total = [weight * value for weight, value in terms.values()]
            if total and functools.reduce(torch.add, total).requires_grad:
                functools.reduce(torch.add, total).backward()
        seen.setdefault(group, {}).update(terms)
        reported.update(extra)

    recipe.step(m, batch, draws, update, STEP)
    return seen, reported


def _values(seen: Seen) -> dict[str, float]:
    return {f"{group}/{name}": term.value.item() for group, terms in seen.items() for name, term in terms.items()}


def _weights(m: Modules) -> list[tuple[str, nn.Parameter]]:
    return [(f"{place}.{name}", p) for place, module in m.named().items() for name, p in module.named_parameters()]
