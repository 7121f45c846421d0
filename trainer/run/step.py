"""One training step: all backward passes, one finiteness check, then all optimizers and the EMA, or nothing."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from components.contracts import Batch, LossTerm, Modules, RandomNumbers, Recipe
from components.distributed import parallel
from components.monitor.latent_statistics import observed, statistics
from components.monitor.metrics import StepRecord
from components.monitor.phases import PhaseClock, end_segment, segments, timed, waiting
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from trainer.config import Config
from trainer.run import assemble, prepare
from trainer.run.first_use import check_terms, checked
from trainer.run.parts import Parts

LOST = 2.0**30  # "stop" of a rank whose data is lost: the mean over ranks exceeds 1, which stop requests cannot reach


def make_step(
    config: Config,
    parts: Parts,
    device: torch.device,
    *,
    accumulation: int | None = None,
    bf16: bool | None = None,
    clock: PhaseClock | None = None,
) -> Step:
    """Create the step of a run, with its parameter groups and EMA.

    Args:
        parts: built.
        device: to run on.
        accumulation: micro-batches per step; None: as in the config.
        bf16: whether to use bf16 autocast; None: determined by config and device.
        clock: measures the phases of a step; None: records have no ``time/*``.
    """
    dtype = prepare.autocast_dtype(config, device) if bf16 is None else (torch.bfloat16 if bf16 else None)
    return Step(
        parts.recipe,
        parts.modules,
        assemble.parameter_groups(config, parts),
        ema=assemble.make_ema(config, parts),
        accumulation=config.training.accumulation if accumulation is None else accumulation,
        autocast_dtype=dtype,
        device=device,
        clock=clock,
        places=parts.places,
        **prepare.image_format(config, device),
    )


class Step:
    """Runs a recipe's step over micro-batches and applies all of its updates, or none if something is not finite.

    No loss of a step depends on another's update, so all backward passes run before the optimizers; the results equal
    those of stepping the optimizers one after the other.

    Args:
        recipe: computes the losses.
        modules: networks and losses of the run.
        groups: parameter groups by name, one per loss of the recipe.
        ema: updated after each applied step; None: no EMA.
        accumulation: micro-batches per step.
        autocast_dtype: bf16 for mixed precision; None: the modules' own dtype.
        image_dtype: dtype that images are converted to; None: unchanged.
        memory_format: of the images; convolutions propagate it.
        clock: measures the phases of each step: "data", one per group that the recipe updates, those that modules
            define ("encoders", a frozen "tokenizer"), and "optimizer" for the rest.
        places: tables of the config by module name, for messages about what a part returns.

    Attributes:
        whole: whether the state in memory is that after a whole step; false while updates are applied, and for good
            after an error in between.
    """

    def __init__(
        self,
        recipe: Recipe,
        modules: Modules,
        groups: dict[str, ParameterGroup],
        *,
        ema: Ema | None,
        accumulation: int,
        autocast_dtype: torch.dtype | None,
        device: torch.device,
        image_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        clock: PhaseClock | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        # Of the first step alone: its modules check what they return.
        self._checked: Modules | None = checked(modules, places or {})
        self.recipe, self.modules, self.groups, self.ema = recipe, modules, groups, ema
        self.accumulation, self.autocast_dtype, self.device = accumulation, autocast_dtype, device
        self.image_dtype, self.memory_format, self.clock = image_dtype, memory_format, clock
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        # Buffers that forward passes change, such as batch-norm statistics; restored if the step is skipped.
        changing = [modules.tokenizer, modules.latent_norm, modules.discriminator]
        self._buffers = [b for module in changing if module is not None for b in module.buffers()]
        self.whole = True
        self._local: Tensor | None = None  # terms of the latest step on this rank

    def __call__(
        self,
        step: int,
        micro_batches: Iterable[tuple[Batch, RandomNumbers]],
        stop: bool = False,
        lost: Callable[[], bool] = lambda: False,
    ) -> StepRecord:
        """Run one step without synchronizing with the device.

        Args:
            step: counted from 0.
            micro_batches: batches with their random numbers, ``accumulation`` of them.
            stop: whether this rank is asked to stop; all ranks then read ``stop`` > 0 from the record of this step.
            lost: called after the micro-batches; whether this rank's data could not be read, so that all ranks skip the
                step and read ``stop`` > 1 from its record.

        Returns:
            Record with the means over ranks and micro-batches of every loss term and of ``latent/*``;
            ``latent_norm/*``, ``grad_norm/*``, ``lr/*``; ``skipped_steps``: 1 if a loss or gradient norm was not
            finite on any rank, so that no update was applied; with a clock, ``time/*`` of this rank.
        """
        with timed(self.clock) as times:
            measured = self._run(step, micro_batches, stop, lost)
        return StepRecord(step, *measured, times, self._local)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager for forward passes outside a step: no gradients, the step's precision, reshards at exit."""
        averages = self.ema.modules.values() if self.ema is not None else ()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            parallel.reshard(*self.modules.named().values(), *averages)

    def _run(
        self, step: int, micro_batches: Iterable[tuple[Batch, RandomNumbers]], stop: bool, lost: Callable[[], bool]
    ) -> tuple[tuple[str, ...], Tensor, dict[str, float], dict[str, tuple[list[str], Tensor]]]:
        """Run the step; returns names and device values of its metrics, host metrics, and gradient norms by layer."""
        before = [b.clone() for b in self._buffers]
        self._terms.clear()
        try:
            self._compute(step, micro_batches)
        except BaseException:
            self._undo(before)
            raise
        measured = self._means(stop, lost())

        layers = {name: (group.names, group.norms()) for name, group in self.groups.items() if group.has_gradients()}
        norms = {name: norms.square().sum().sqrt().to(self.device) for name, (_, norms) in layers.items()}
        losses = [measured[f"{name}/loss"] for name in self.groups if f"{name}/loss" in measured]
        finite = torch.isfinite(torch.stack([*losses, *norms.values()])).all() & (measured["stop"] <= 1)

        self.whole = False
        lrs = {f"lr/{name}": group.apply(step, norms.get(name), finite) for name, group in self.groups.items()}
        for buffer, old in zip(self._buffers, before):
            buffer.copy_(torch.where(finite, buffer, old))
        if self.ema is not None:
            self.ema.update(finite)
        # Back to shards before they change: gathered weights would hide them and become stale.
        parallel.reshard(*self.modules.copies.values())
        self.recipe.after_step(self.modules, finite, step)
        self.whole = True

        measured |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if self.modules.latent_norm is not None:
            norm = self.modules.latent_norm.summary()
            measured["latent/variance"] = norm["variance_mean"]
            measured |= {f"latent_norm/{name}": value for name, value in norm.items()}
        measured["skipped_steps"] = ~finite
        values = torch.stack([v.to(self.device, torch.float64) for v in measured.values()])
        return tuple(measured), values, lrs, layers

    def _compute(self, step: int, micro_batches: Iterable[tuple[Batch, RandomNumbers]]) -> None:
        """Add up the gradients and collect the loss terms of all micro-batches."""
        for batch, random in waiting("data", micro_batches):
            if batch.images is not None:
                images = batch.images.to(dtype=self.image_dtype, memory_format=self.memory_format)
                batch = batch._replace(images=images)
            with self._autocast(), segments(), observed() as latents:
                self.recipe.step(self._checked or self.modules, batch, random, self._update, step)
            for z in latents:
                for name, value in statistics(z).items():
                    self._terms[f"latent/{name}"].append(value.to(self.device, torch.float64))
        self._checked = None

    def _undo(self, before: list[Tensor]) -> None:
        """Return to the state after the last step, when an error has ended the micro-batches of this one."""
        self.whole = False
        self._terms.clear()
        with contextlib.suppress(Exception), torch.no_grad():  # the caller raises the first error
            for buffer, old in zip(self._buffers, before):
                buffer.copy_(old)
            for group in self.groups.values():
                group.optimizer.zero_grad(set_to_none=True)
            parallel.reshard(*self.modules.named().values())
            self.whole = True

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _means(self, stop: bool, lost: bool) -> dict[str, Tensor]:
        """Mean of every term over micro-batches and ranks, in one all-reduce; non-finite if it is so on any rank."""
        means = {name: torch.stack(values).mean() for name, values in self._terms.items()}
        means["stop"] = torch.full((), LOST if lost else float(stop), dtype=torch.float64, device=self.device)
        flat = torch.stack(list(means.values()))
        self._local = flat.clone()
        return dict(zip(means, parallel.mean_over_ranks(flat)))

    def _update(self, group: str, terms: dict[str, LossTerm], **logged: Tensor) -> None:
        if group not in self.groups:
            raise KeyError(f"the recipe updates '{group}', but its `trains` declares only {sorted(self.groups)}")
        if self._checked is not None:
            check_terms(self.recipe, group, terms)
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        values = {name: value for name, (_, value) in terms.items()} | logged | {"loss": total}
        for name, value in values.items():
            self._terms[f"{group}/{name}"].append(value.detach().to(self.device, torch.float64))
        # No gradient before a discriminator's start step.
        if total.requires_grad:
            with torch.autocast(self.device.type, enabled=False):
                (total / self.accumulation).backward()
        end_segment(group)
