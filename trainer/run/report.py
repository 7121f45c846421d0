"""Output of a run: TensorBoard, metrics.jsonl, the progress bar, log lines, image grids."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from components import registry
from components.distributed.parallel import World, gather_floats
from components.files.atomic import append_line
from components.finite import count_of, faulty_rows
from components.optim.ema import Ema
from trainer.config import Config, flatten
from trainer.run import pictures
from trainer.run.monitor.events import EventWriter
from trainer.run.monitor.speed import Eta, Stopwatch, clock_time, device_peak, memory, speeds
from trainer.run.monitor.stragglers import Stragglers, probe
from trainer.run.parts import Parts
from trainer.run.terminal import Bar
from trainer.run.troubles import Troubles

logger = logging.getLogger("titanrepa")

# Scalars whose last values appear in the HPARAMS tab.
FINAL = ("evaluation/", "samples/", "speed/images_per_s", "speed/mfu", "latent/variance", "latent/spatial_variance")


class Reporter:
    """Writes the output of a run on rank 0. Every rank calls every method, since some are collective.

    Args:
        config: of the run.
        world: this process.
        groups: names of the parameter groups, whose losses appear on the progress bar.
        step: last finished step.
        flops_per_image: FLOPs of the model per image; None: unknown, so TFLOP/s and MFU are not reported.
        troubles: counts files that cannot be written, which costs a warning; None: a new one.

    Attributes:
        stopwatch: measures training time and its interruptions.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        groups: list[str],
        step: int,
        flops_per_image: int | None = None,
        troubles: Troubles | None = None,
    ) -> None:
        self.troubles = troubles or Troubles()
        self.config, self.world, self.groups, self.flops_per_image = config, world, groups, flops_per_image
        self.folder = Path(config.run.dir)
        self.writer: EventWriter | None = None
        self.stopwatch = Stopwatch(world.device)
        self.stragglers = Stragglers()
        self.peak = self._peak()
        self._shown: dict[str, float] = {}  # last value by tag
        self._trained: tuple[float, dict[str, float]] = (0.0, {})  # seconds of training, and of each interruption
        # None: show the bar only on a terminal; elsewhere report() logs lines.
        disable = None if world.is_main else True
        total = config.training.steps
        self.bar = Bar(total=total, initial=step, unit="step", disable=disable, dynamic_ncols=True)
        self.begin(step)

    def begin(self, step: int) -> None:
        """Start after ``step``; TensorBoard hides points of later steps, which a rollback or resume discarded."""
        self._since = (step, 0.0)
        self._eta = Eta(step, self.config.training.steps)
        self.stopwatch.begin()
        self.bar.n = step
        self.bar.refresh()
        if self.world.is_main:
            if self.writer is not None:
                with self._tensorboard():
                    self.writer.close()
            self.writer = EventWriter(self.folder / "tensorboard", step + 1 if step else None)
            with self._tensorboard():
                self.writer.text("config", "```toml\n" + self.config.to_toml() + "```", step)

    def close(self) -> None:
        """Write the hyperparameters with the last values, and log how time was spent. To be called after errors too."""
        self.bar.close()
        if self.writer is None:
            return
        if self._shown:
            with self._tensorboard():
                self.writer.hyperparameters(flatten(self.config.to_toml()), self._final_metrics())
            seconds, outside = self._add_up(*self.stopwatch.read())
            spent = "".join(f", {clock_time(s)} {name}" for name, s in outside.items() if s >= 0.5)
            logger.info(f"time of this start: {clock_time(seconds)} training{spent}")
        with self._tensorboard():
            self.writer.close()

    def _tensorboard(self) -> contextlib.AbstractContextManager[None]:
        return self.troubles.only_warning("TensorBoard")

    def report(self, step: int, values: dict[str, float], waited_s: float) -> None:
        """Report the means since the last report; the device must be idle. Collective.

        Args:
            step: number of finished steps.
            values: by TensorBoard tag.
            waited_s: total seconds that this rank has waited for data so far.
        """
        seconds, outside = self.stopwatch.read()
        with self.stopwatch.outside("logging"):
            self._report(step, values, waited_s, seconds, outside)

    def _report(
        self, step: int, values: dict[str, float], waited_s: float, seconds: float, outside: dict[str, float]
    ) -> None:
        before, waited = self._since
        self._since = (step, waited_s)
        self._add_up(seconds, outside)
        share = (waited_s - waited) / seconds
        ranks = gather_floats(share, probe(self.world.device) if self.world.size > 1 else 0.0)
        if self.writer is None:
            return
        steps, lost = step - before, sum(outside.values())
        images = steps * self.config.training.batch_size
        values |= speeds(images, seconds, self.world.size, self.flops_per_image, self.peak)
        values["speed/data_wait_share"] = max(share for share, _ in ranks)
        values |= self.name_stragglers(step, ranks)
        values |= {f"time/outside/{name}": s for name, s in outside.items()}
        values["time/outside/share"] = lost / (seconds + lost)
        values |= memory(self.world.device)
        self._write(step, values)
        if values.get("skipped_steps"):
            share = values["skipped_steps"]
            logger.warning(f"step {step}: skipped {share:.0%} of the last {steps} steps: not finite")
        self._log(step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Update the progress bar and log a line; a terminal with a bar does not show the line."""
        shown = {name: f"{values[f'{name}/loss']:.3f}" for name in self.groups if f"{name}/loss" in values}
        speed = {"images/s": f"{values['speed/images_per_s']:.4g}"}
        if "speed/mfu" in values:
            speed["MFU"] = f"{values['speed/mfu']:.1%}"
        elif "speed/tflops_per_gpu" in values:
            speed["TFLOP/s"] = f"{values['speed/tflops_per_gpu']:.3g}"
        self.bar.set_postfix(shown | speed)
        total, left = self.config.training.steps, self._eta(step)
        line = [f"{name} {value}" for name, value in shown.items()] + [
            f"{value} {name}" for name, value in speed.items()
        ]
        if left and step < total:
            line.append(f"{left} to go")
        logger.info(f"step {step} of {total}: {', '.join(line)}", extra={"on_bar": not self.bar.disable})

    def mark(self, alarm: str, step: int) -> None:
        """Mark an alarm in TensorBoard at once, since it may end the run."""
        if self.writer is not None:
            with self._tensorboard():
                self.writer.scalars({f"alarms/{alarm}": 1.0}, step)

    def name_stragglers(self, step: int, ranks: list[list[float]]) -> dict[str, float]:
        """See :class:`trainer.run.monitor.stragglers.Stragglers`."""
        return self.stragglers(step, ranks)

    def draw(self, step: int, parts: Parts, ema: Ema | None, check_stop: Callable[[], None] | None = None) -> None:
        """Write image grids, latent norm histograms, and the fraction of samples that the dataset's judge recognizes.

        The grids show reconstructions with their latents, and samples. Collective. ``check_stop`` may raise, on all
        ranks at once, before each evaluation of the denoiser. Nothing is compiled for these few images.
        """
        panels = {}
        if parts.images is not None:  # may be absent with cached latents
            originals = pictures.fixed_images(parts, self.world.device)
            with torch.compiler.set_stance("force_eager"):
                latents, rebuilt = pictures.reconstruct(parts, ema, originals)
            if self._finite(step, "reconstructions", rebuilt) and self._finite(step, "latents", latents):
                colors = pictures.in_colors(latents, originals.shape[-1])
                panels["reconstructions"] = pictures.in_rows(originals, rebuilt, colors)
        images = labels = None
        if parts.modules.denoiser is not None:
            with torch.compiler.set_stance("force_eager"):
                images, labels = pictures.sample_images(
                    self.config, parts, ema, self.world, self.config.sampling.images, check_stop
                )
            if self._finite(step, "samples", images):
                panels["samples"] = pictures.grid(images)
        if self.writer is None:
            return
        if "samples" in panels and parts.images is not None and parts.images.has_judge:
            right = (parts.images.judge(images.cpu()) == labels.cpu()).float().mean().item()
            self._write(step, {"samples/judged_right": right}, json_too=False)
            logger.info(f"step {step}: the judge recognizes {right:.0%} of {len(images)} samples")
        if (norm := parts.modules.latent_norm) is not None:
            with self._tensorboard():
                self.writer.histogram("latent_norm/running_mean", norm.running_mean, step)
                self.writer.histogram("latent_norm/running_variance", norm.running_var, step)
        for name, picture in panels.items():
            with self._tensorboard():
                self.writer.picture(name, picture, step)
            with self.troubles.only_warning("images/"):
                pictures.save_png(picture, self.folder / "images" / f"{name}_{step:08d}.png")

    def _finite(self, step: int, name: str, values: Tensor) -> bool:
        """Whether all rows of ``values`` (B, ...) are finite; otherwise logs why there is no picture of them."""
        if (faulty := faulty_rows(values)) and self.world.is_main:
            logger.warning(f"step {step}: no picture, as {count_of(faulty, len(values), name)}")
        return not faulty

    def evaluated(self, step: int, values: dict[str, float | None], warnings: list[str]) -> None:
        """Report metrics of samples and reconstructions; None marks a value that could not be computed."""
        if self.writer is None:
            return
        for warning in warnings:
            logger.warning(f"step {step}: {warning}")
        self._write(step, {f"evaluation/{name}": value for name, value in values.items() if value is not None})
        shown = ", ".join(f"{name} -" if value is None else f"{name} {value:.3f}" for name, value in values.items())
        logger.info(f"step {step}: {shown}")

    def _write(self, step: int, values: dict[str, float], json_too: bool = True) -> None:
        self._shown |= values
        with self._tensorboard():
            self.writer.scalars(values, step)
        if json_too:
            with self.troubles.only_warning("metrics.jsonl"):
                append_line(self.folder / "metrics.jsonl", json.dumps({"step": step, **values}))

    def _add_up(self, seconds: float, outside: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Add to the time spent since the start of this process, and return the totals."""
        before, parts = self._trained
        names = dict.fromkeys((*parts, *outside))
        self._trained = before + seconds, {name: parts.get(name, 0.0) + outside.get(name, 0.0) for name in names}
        return self._trained

    def _final_metrics(self) -> list[str]:
        """Tags for the HPARAMS tab, including later ones, since TensorBoard keeps the list of a run's first end."""
        e, dataset = self.config.evaluation, registry.datasets.get(self.config.dataset.name).cls
        coming = [f"evaluation/{name}" for name in e.wanted if e.every]
        if "denoiser" in self.groups and dataset.has_judge:
            coming.append("samples/judged_right")
        shown = [tag for tag in self._shown if tag.startswith(FINAL) or tag.endswith("/loss")]
        return list(dict.fromkeys([*(f"{group}/loss" for group in self.groups), *shown, *coming]))

    def _peak(self) -> float | None:
        """Peak TFLOP/s of the GPU, or None; logs if the GPU is unknown."""
        if not self.world.is_main or self.world.device.type != "cuda":
            return None
        name, peak = device_peak(self.world.device)
        if peak is None:
            logger.info(
                f"unknown peak FLOP/s of '{name}' (see components/monitor/hardware.py): reporting TFLOP/s without MFU"
            )
        return peak
