"""One training step: every loss backward, one check, then all optimizers and the EMA, or nothing at all."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from components.contracts import Batch, Draws, Modules, Recipe, Weighted
from components.distributed import parallel
from components.monitor.latent_statistics import observed, statistics
from components.monitor.metrics import StepRecord
from components.monitor.phases import PhaseClock, end_segment, segments, timed, waiting
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from trainer.config import Config
from trainer.run import assemble, prepare
from trainer.run.parts import Parts


def make_step(
    config: Config,
    parts: Parts,
    device: torch.device,
    *,
    accumulation: int | None = None,
    bf16: bool | None = None,
    clock: PhaseClock | None = None,
) -> Step:
    """The step of a run, with its parameter groups and averages.

    Args:
        parts: built.
        device: where it runs.
        accumulation: micro-batches per step; None: as the config says.
        bf16: autocast; None: as config and device say.
        clock: measures its phases; None: no ``time/*`` in its records.
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
        **prepare.image_format(config),
    )


class Step:
    """Runs a recipe's step over micro-batches and applies it whole.

    Losses of a step never see each other's updates, so the three backward passes can come before every optimizer;
    the numbers are those of stepping one after the other.

    Args:
        recipe: builds the losses.
        modules: the parts it works on.
        groups: what each loss trains, by name.
        ema: averages to move after each applied step; none: no averages.
        accumulation: micro-batches per step.
        autocast_dtype: bf16 for mixed precision; none: the modules' own dtype.
        image_dtype: of the images that the modules are given; none: as they come.
        memory_format: of those images; convolutions follow it.
        clock: measures the phases of each step: "data", one per group that the recipe updates, those that parts claim
            for themselves ("encoders", a frozen "tokenizer"), and "optimizer" for the rest.
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
    ) -> None:
        self.recipe, self.modules, self.groups, self.ema = recipe, modules, groups, ema
        self.accumulation, self.autocast_dtype, self.device = accumulation, autocast_dtype, device
        self.image_dtype, self.memory_format, self.clock = image_dtype, memory_format, clock
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        # What forward passes change: batch-norm statistics and the like. Undone if the step is not applied.
        changing = [modules.tokenizer, modules.latent_norm, modules.discriminator]
        self._buffers = [b for module in changing if module is not None for b in module.buffers()]

    def __call__(self, step: int, micro_batches: Iterable[tuple[Batch, Draws]], stop: bool = False) -> StepRecord:
        """One step, counted from 0. Does not wait for the device.

        Args:
            stop: this rank is asked to stop; every rank finds ``stop`` > 0 in the record of this step.

        Returns:
            Means over ranks and micro-batches of every loss term and of ``latent/*``; ``latent_norm/*``,
            ``grad_norm/*``, ``lr/*``; ``skipped_steps``, 1 where a loss or a gradient norm was not finite on some
            rank, so that nothing was applied; with a clock, ``time/*`` of this rank.
        """
        with timed(self.clock) as times:
            measured = self._run(step, micro_batches, stop)
        return StepRecord(step, *measured, times)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes outside a step: without gradients, in the step's precision."""
        averages = self.ema.modules.values() if self.ema is not None else ()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            parallel.reshard(*self.modules.named().values(), *averages)

    def _run(
        self, step: int, micro_batches: Iterable[tuple[Batch, Draws]], stop: bool
    ) -> tuple[tuple[str, ...], Tensor, dict[str, float], dict[str, tuple[list[str], Tensor]]]:
        """The step; names and values of what it measured on the device, what the host knows, norms by layer."""
        before = [b.clone() for b in self._buffers]
        self._terms.clear()
        for batch, draws in waiting("data", micro_batches):
            if batch.images is not None:
                images = batch.images.to(dtype=self.image_dtype, memory_format=self.memory_format)
                batch = batch._replace(images=images)
            with self._autocast(), segments(), observed() as latents:
                self.recipe.step(self.modules, batch, draws, self._update, step)
            for z in latents:
                for name, value in statistics(z).items():
                    self._terms[f"latent/{name}"].append(value.to(self.device, torch.float64))
        measured = self._means(stop)

        layers = {name: (group.names, group.norms()) for name, group in self.groups.items() if group.has_gradients()}
        norms = {name: norms.square().sum().sqrt().to(self.device) for name, (_, norms) in layers.items()}
        losses = [measured[f"{name}/loss"] for name in self.groups if f"{name}/loss" in measured]
        finite = torch.isfinite(torch.stack([*losses, *norms.values()])).all()

        lrs = {f"lr/{name}": group.apply(step, norms.get(name), finite) for name, group in self.groups.items()}
        for buffer, old in zip(self._buffers, before):
            buffer.copy_(torch.where(finite, buffer, old))
        if self.ema is not None:
            self.ema.update(finite)

        measured |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        if self.modules.latent_norm is not None:
            norm = self.modules.latent_norm.summary()
            measured["latent/variance"] = norm["variance_mean"]
            measured |= {f"latent_norm/{name}": value for name, value in norm.items()}
        measured["skipped_steps"] = ~finite
        values = torch.stack([v.to(self.device, torch.float64) for v in measured.values()])
        return tuple(measured), values, lrs, layers

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _means(self, stop: bool) -> dict[str, Tensor]:
        """Every term's mean over micro-batches and ranks, in one reduction; not finite if it was so on any rank."""
        means = {name: torch.stack(values).mean() for name, values in self._terms.items()}
        means["stop"] = torch.full((), float(stop), dtype=torch.float64, device=self.device)
        flat = torch.stack(list(means.values()))
        return dict(zip(means, parallel.mean_over_ranks(flat)))

    def _update(self, group: str, terms: dict[str, Weighted], **extra: Tensor) -> None:
        if group not in self.groups:
            raise KeyError(f"the recipe updates '{group}', but its `trains` names only {sorted(self.groups)}")
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        values = {name: value for name, (_, value) in terms.items()} | extra | {"loss": total}
        for name, value in values.items():
            self._terms[f"{group}/{name}"].append(value.detach().to(self.device, torch.float64))
        # A discriminator before its start step has nothing to learn from.
        if total.requires_grad:
            with torch.autocast(self.device.type, enabled=False):
                (total / self.accumulation).backward()
        end_segment(group)
