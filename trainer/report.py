"""What a run shows: TensorBoard, metrics.jsonl, the progress bar, log lines, pictures."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from components.ema import Ema
from components.parallel import World, gather_floats
from trainer import pictures
from trainer.assemble import Parts
from trainer.config import Config

logger = logging.getLogger("titanrepa")

SLOW = 1.5  # a rank is named when it takes so many times as long as the median one
WAITING = 0.1  # a rank is named when it spends this share of its time waiting for data


class Reporter:
    """Writes what rank 0 shows; every rank calls every method, since some of what is shown is computed together.

    Args:
        config: of the run.
        world: this process.
        groups: names of the parameter groups, whose losses stand on the progress bar.
        step: the last finished one.
    """

    def __init__(self, config: Config, world: World, groups: list[str], step: int) -> None:
        self.config, self.world, self.groups = config, world, groups
        self.folder = Path(config.run.dir)
        self.writer = None
        self._slow: int | None = None
        # None: only on a terminal. Elsewhere a bar is noise, and report() logs lines.
        disable = None if world.is_main else True
        total = config.training.steps
        self.bar = tqdm(total=total, initial=step, unit="step", disable=disable, dynamic_ncols=True)
        self.begin(step)

    def begin(self, step: int) -> None:
        """Starts behind ``step``; what was shown of later steps is a past that did not happen."""
        self._since = (time.perf_counter(), step, 0.0)
        self.bar.n = step
        self.bar.refresh()
        if self.world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            if self.writer is not None:
                self.writer.close()
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else None)
            self.writer.add_text("config", "```toml\n" + self.config.to_toml() + "```", step)

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def report(self, step: int, values: dict[str, float], waited_s: float) -> None:
        """Shows the means since the last report.

        Args:
            step: finished steps.
            values: by TensorBoard tag.
            waited_s: seconds that this rank has ever waited for data.
        """
        now = time.perf_counter()
        then, before, waited = self._since
        self._since = (now, step, waited_s)
        steps = step - before
        share = (waited_s - waited) / (now - then)
        ranks = gather_floats(share, _probe(self.world.device) if self.world.size > 1 else 0.0)
        if self.writer is None:
            return
        values["speed/images_per_s"] = steps * self.config.training.batch_size / (now - then)
        values["speed/data_wait_share"] = max(share for share, _ in ranks)
        if self.world.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.name_stragglers(step, ranks)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if values.get("skipped_steps"):
            share = values["skipped_steps"]
            logger.warning(f"step {step}: {share:.0%} of the last {steps} steps skipped: not finite")
        losses = {name: f"{values[f'{name}/loss']:.3f}" for name in self.groups if f"{name}/loss" in values}
        self.bar.set_postfix(losses)
        if self.bar.disable:
            speed = f"{values['speed/images_per_s']:.0f} images/s"
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            logger.info(f"step {step} of {self.config.training.steps}: {shown}, {speed}")

    def mark(self, alarm: str, step: int) -> None:
        """Marks an alarm in TensorBoard at once: the run may end by it."""
        if self.writer is not None:
            self.writer.add_scalar(f"alarms/{alarm}", 1.0, step)
            self.writer.flush()

    def name_stragglers(self, step: int, ranks: list[list[float]]) -> None:
        """Warns of the rank that waits longest for data, and of one that computes far slower than the others.

        Args:
            ranks: of each rank the share of its time spent waiting for data, and the seconds of a fixed computation.
        """
        if len(ranks) < 2:
            return
        waits, probes = zip(*ranks)
        slowest = max(range(len(ranks)), key=lambda rank: waits[rank])
        if waits[slowest] > WAITING:
            logger.warning(
                f"step {step}: rank {slowest} spends {waits[slowest]:.0%} of its time waiting for data (the median "
                f"rank {sorted(waits)[len(waits) // 2]:.0%}), and all others wait for it; more loader.workers or a "
                "faster disk there would help"
            )
        slowest = max(range(len(ranks)), key=lambda rank: probes[rank])
        usual = sorted(probes)[(len(probes) - 1) // 2]
        if self.writer is not None:
            self.writer.add_scalar("speed/slowest_rank_ratio", probes[slowest] / usual, step)
        named, self._slow = self._slow, slowest if probes[slowest] > SLOW * usual else None
        if self._slow is not None and named == slowest:  # once may be chance
            logger.warning(
                f"step {step}: rank {slowest} computes {probes[slowest] / usual:.1f} times slower than the median "
                "rank, and all others wait for it; look at its device's clock, heat and other users"
            )

    def draw(self, step: int, parts: Parts, ema: Ema | None) -> None:
        """Grids of reconstructions and samples, and how many samples the dataset's own judge recognises."""
        panels = {}
        if parts.images is not None:  # on cached latents they need not be there
            originals = pictures.fixed_images(parts, self.world.device)
            rebuilt = pictures.reconstruct(parts, ema, originals)
            panels["reconstructions"] = pictures.side_by_side(originals, rebuilt)
        images = labels = None
        if parts.modules.denoiser is not None:
            images, labels = pictures.sample_images(self.config, parts, ema, self.world, self.config.sampling.images)
            panels["samples"] = pictures.grid(images)
        if self.writer is None:
            return
        if images is not None and hasattr(parts.images, "judge"):
            right = (parts.images.judge(images.cpu()) == labels.cpu()).float().mean().item()
            self.writer.add_scalar("samples/judged_right", right, step)
            logger.info(f"step {step}: the judge recognises {right:.0%} of {len(images)} samples")
        for name, picture in panels.items():
            self.writer.add_image(name, picture, step)
            pictures.save_png(picture, self.folder / "images" / f"{name}_{step:08d}.png")

    def evaluated(self, step: int, values: dict[str, float | None], warnings: list[str]) -> None:
        """Shows how samples compare with real images; None is a value that could not be had."""
        if self.writer is None:
            return
        for warning in warnings:
            logger.warning(f"step {step}: {warning}")
        found = {f"evaluation/{name}": value for name, value in values.items() if value is not None}
        for name, value in found.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")
        shown = ", ".join(f"{name} -" if value is None else f"{name} {value:.3f}" for name, value in values.items())
        logger.info(f"step {step}: {shown}")


def _probe(device: torch.device) -> float:
    """Seconds of a fixed computation: what this rank's device is capable of right now. Some milliseconds."""
    size, count = (4096, 8) if device.type == "cuda" else (256, 8)
    x = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):  # the best of three: a hiccup is no straggler
        start = time.perf_counter()
        for _ in range(count):
            x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
