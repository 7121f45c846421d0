"""The training loop: resume, iterate, log, draw, save, stop when asked."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from components import parallel
from components.checkpoint import (
    CheckpointManager,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from components.data import UnreadableCounter, make_loader
from components.draws import Draws, draw
from components.metrics import Metrics
from components.parallel import World
from components.prefetch import Prefetcher
from trainer import pictures
from trainer.assemble import build, check, make_ema, parameter_groups
from trainer.config import Config, flatten
from trainer.latents import prepare_latent_norm
from trainer.step import Step

logger = logging.getLogger("titanrepa")


class Trainer:
    """One run, from assembly to the last step.

    Args:
        config: validated.
        world: this process among the ranks.

    Raises:
        ConfigError: before any large part is built.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world, self.device = config, world, world.device
        self.folder = Path(config.run.dir)
        check(config, world.size)
        self.parts = build(config, self.device)
        self.groups = parameter_groups(config, self.parts)
        self.ema = make_ema(config, self.parts)
        self.metrics = Metrics()
        bf16 = config.training.precision == "bf16" and self.device.type == "cuda"
        self.train_step = Step(
            self.parts.recipe,
            self.parts.modules,
            self.groups,
            ema=self.ema,
            accumulation=config.training.accumulation,
            autocast_dtype=torch.bfloat16 if bf16 else None,
            metrics=self.metrics,
            device=self.device,
        )
        self.unreadable = UnreadableCounter(config.loader.max_unreadable)
        self.checkpoints = CheckpointManager(self.folder / "checkpoints", keep=config.run.keep_checkpoints)
        self.step = 0
        self.consumed = 0
        self.stopping = False

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything the next step depends on, and the frozen tokenizer, so that a run folder can be sampled from."""
        modules = {"tokenizer", "latent_norm"} | {name for group in self.groups.values() for name in group.modules}
        named = self.parts.modules.named()
        return {
            "modules": {name: module_state(named[name]) for name in sorted(modules) if name in named},
            "ema": {name: module_state(m) for name, m in self.ema.modules.items()} if self.ema else {},
            "optimizers": {name: optimizer_state(g.modules, g.optimizer) for name, g in self.groups.items()},
            "progress": {"step": self.step, "consumed": self.consumed, "unreadable": self.unreadable.state_dict()},
            "config": self.config.to_toml(),
        }

    def resume(self) -> bool:
        """Loads the newest sound checkpoint of the run folder, if there is one."""
        path = self.checkpoints.latest()
        if path is None:
            return False
        state = self.checkpoints.load(path, self.state())
        named = self.parts.modules.named()
        for name, module in state["modules"].items():
            load_module_state(named[name], module)
        for name, module in state["ema"].items():
            load_module_state(self.ema.modules[name], module)
        for name, group in self.groups.items():
            load_optimizer_state(group.modules, group.optimizer, state["optimizers"][name])
        progress = state["progress"]
        self.step, self.consumed = progress["step"], progress["consumed"]
        self.unreadable.load_state_dict(progress["unreadable"])
        self._log(f"resumed from {path} at step {self.step}")
        for change in changes(state["config"], self.config.to_toml()):
            self._log(f"changed since that checkpoint: {change}")
        return True

    def save(self) -> None:
        """Writes a checkpoint of the current step."""
        start = time.perf_counter()
        path = self.checkpoints.save(self.step, self.state())
        self._log(f"saved {path} in {time.perf_counter() - start:.1f} s")

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains to the last step, or to the step in which a signal arrives.

        Returns:
            Whether the run is complete.
        """
        self._prepare_folder()
        if not self.resume():
            prepare_latent_norm(self.config, self.parts, self.world)
            if self.ema is not None:
                self.ema.reset()
        total = self.config.training.steps
        if self.step >= total:
            self._log(f"already complete: step {self.step} of {total}; raise training.steps to go on")
            return True
        with _signals(self._request_stop), self._batches() as batches, self._progress_bar() as bar:
            writer = self._writer()
            while self.step < total and not self.stopping:
                self.train_step(self.step, self._micro_batches(batches))
                self.step += 1
                self.consumed += self.config.training.batch_size
                bar.update()
                self.stopping = parallel.any_rank(self.stopping)
                self._after_step(writer, bar, batches, last=self.step == total)
            if writer is not None:
                writer.close()
        return self.step >= total

    def _after_step(self, writer, bar: tqdm, batches: Prefetcher, last: bool) -> None:
        run, every = self.config.run, self.config.sampling.every
        if last or self.stopping or self.step % run.log_every == 0 or self.step == 1:
            self._report(writer, bar, batches)
        # Saved first: pictures take memory, and must not cost the step if they fail.
        if last or self.stopping or (run.checkpoint_every and self.step % run.checkpoint_every == 0):
            self.save()
        if last or (every and self.step % every == 0):
            self._draw(writer)

    def _batches(self) -> Prefetcher:
        c = self.config
        loader = make_loader(
            self.parts.dataset,
            seed=c.training.seed,
            batch_size=c.training.batch_size,
            rank=self.world.rank,
            world=self.world.size,
            accumulation=c.training.accumulation,
            consumed=self.consumed,
            workers=c.loader.workers,
            prefetch=c.loader.prefetch,
            pin_memory=self.device.type == "cuda",
        )
        first_step, first_position = self.step, self.consumed
        size = c.training.batch_size // (self.world.size * c.training.accumulation)

        def draws(position: int) -> Draws:
            steps, place = divmod(position - first_position, c.training.batch_size)
            here = range(place, place + size)
            drawn = draw(c.training.seed, first_step + steps, here, c.training.batch_size, self.parts.latent)
            return drawn.to(self.device, non_blocking=True)

        return Prefetcher(loader, self.device, extra=draws)

    def _micro_batches(self, batches: Prefetcher) -> Iterator:
        for _ in range(self.config.training.accumulation):
            batch, draws, unreadable = next(batches)
            self.unreadable.update(len(batch.labels), unreadable)
            if self.config.training.precision == "fp64":
                batch = batch._replace(images=batch.images.double())
            yield batch, draws

    # -- reports -------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(self.config.to_toml())

    def _progress_bar(self) -> tqdm:
        # None: only on a terminal. Elsewhere a bar is noise, and _report writes lines.
        disable = None if self.world.is_main else True
        total = self.config.training.steps
        return tqdm(total=total, initial=self.step, unit="step", disable=disable, dynamic_ncols=True)

    def _writer(self):
        if not self.world.is_main:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # Events behind the resumed step are a past that did not happen.
        writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1 if self.step else None)
        writer.add_text("config", "```toml\n" + self.config.to_toml() + "```", self.step)
        self._since = (time.perf_counter(), self.step, 0.0)
        return writer

    def _report(self, writer, bar: tqdm, batches: Prefetcher) -> None:
        values = self.metrics.read()
        if writer is None:
            return
        now = time.perf_counter()
        then, step, waited = self._since
        self._since = (now, self.step, batches.waited_s)
        steps = self.step - step
        values["speed/images_per_s"] = steps * self.config.training.batch_size / (now - then)
        values["speed/data_wait_share"] = (batches.waited_s - waited) / (now - then)
        values["data/unreadable"] = float(self.unreadable.count)
        values["data/epoch"] = self.consumed / len(self.parts.dataset)
        if self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for name, value in values.items():
            writer.add_scalar(name, value, self.step)
        writer.flush()
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        if values.get("skipped_steps"):
            share = values["skipped_steps"]
            logger.warning(f"step {self.step}: {share:.0%} of the last {steps} steps skipped: not finite")
        losses = {name: f"{values[f'{name}/loss']:.3f}" for name in self.groups if f"{name}/loss" in values}
        bar.set_postfix(losses)
        if bar.disable:
            speed = f"{values['speed/images_per_s']:.0f} images/s"
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            self._log(f"step {self.step} of {self.config.training.steps}: {shown}, {speed}")

    def _draw(self, writer) -> None:
        """Grids of reconstructions and samples, and how many samples the dataset's own judge recognises."""
        if writer is None:
            return
        originals = pictures.fixed_images(self.parts, self.device)
        panels = {
            "reconstructions": pictures.side_by_side(originals, pictures.reconstruct(self.parts, self.ema, originals))
        }
        if self.parts.modules.denoiser is not None:
            count = self.config.sampling.images
            images, labels = pictures.sample_images(self.config, self.parts, self.ema, self.device, count)
            panels["samples"] = pictures.grid(images)
            if hasattr(self.parts.dataset, "judge"):
                right = (self.parts.dataset.judge(images.cpu()) == labels.cpu()).float().mean().item()
                writer.add_scalar("samples/judged_right", right, self.step)
                self._log(f"step {self.step}: the judge recognises {right:.0%} of {count} samples")
        for name, picture in panels.items():
            writer.add_image(name, picture, self.step)
            pictures.save_png(picture, self.folder / "images" / f"{name}_{self.step:08d}.png")

    def _request_stop(self, signum: int, frame) -> None:
        if self.stopping:  # the second Ctrl-C means it
            raise KeyboardInterrupt
        self.stopping = True
        self._log(f"{signal.Signals(signum).name}: finishing this step, then saving (again to stop at once)")

    def _log(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)


def changes(old: str, new: str) -> list[str]:
    """Keys that differ between two resolved configs, as "training.steps: 3 -> 6"."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in keys]


class _signals:
    """SIGINT and SIGTERM call ``handler`` inside; outside they do what they did."""

    def __init__(self, handler) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self.handler) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for s, before in self.before.items():
            signal.signal(s, before)
