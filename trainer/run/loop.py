"""The training loop: resume, step, check for anomalies, log, sample, evaluate, save, and stop gracefully."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from components.checkpoint import (
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)
from components.data.loader import UnreadableCounter
from components.distributed.parallel import World
from components.files.atomic import atomic_write
from components.monitor.guard import Alarm
from components.monitor.metrics import Metrics, StepRecord, same_on_all_ranks
from components.monitor.phases import PhaseClock
from components.version import version
from trainer.config import Config, changes
from trainer.run import alarms
from trainer.run.assemble import construct, prepare
from trainer.run.checkpoints import Checkpoints
from trainer.run.feed import Feed
from trainer.run.follow_up import Stopped, due_after, follow_up, stop_requested
from trainer.run.initial_statistics import prepare_latent_norm
from trainer.run.monitor.flops import try_flops_per_image
from trainer.run.monitor.profiling import Profiler, profiling
from trainer.run.prepare import precision_note
from trainer.run.process import StopSignals, garbage_collected
from trainer.run.report import Reporter
from trainer.run.rescue import rescue
from trainer.run.run_log import start_run_log
from trainer.run.step import make_step
from trainer.run.troubles import Troubles

logger = logging.getLogger("titanrepa")


class Trainer:
    """One training run, from assembly to the last step.

    Args:
        config: validated.
        world: this process.
        troubles: counts failures that do not end the run; None: a new one.
        accept_classes: resume although the dataset's classes differ from those of the checkpoint.

    Raises:
        ConfigError: the config cannot be run; raised before any large part is built.
    """

    def __init__(
        self, config: Config, world: World, troubles: Troubles | None = None, accept_classes: bool = False
    ) -> None:
        self.troubles = troubles or Troubles()
        self.config, self.world, self.device = config, world, world.device
        self.accept_classes = accept_classes
        self.folder = Path(config.run.dir)
        self.parts = construct(config, world)
        self.evaluation = None
        if config.evaluation.every:
            from trainer.evaluation.in_training import TrainingEvaluation

            self.evaluation = TrainingEvaluation(config, world, self.parts.images)
        self._meta = self.parts.on_meta()
        prepare(config, self.parts, world)
        # Recorded in the config, since the dataset may be unavailable when the run is sampled from.
        config.training.num_classes = self.parts.num_classes
        for note in filter(None, [*self.parts.classes.notes(), precision_note(config, self.device)]):
            self._log(note)
        self.metrics = Metrics()
        self.clock = PhaseClock(self.device)
        self.train_step = make_step(config, self.parts, self.device, clock=self.clock)
        self.groups, self.ema = self.train_step.groups, self.train_step.ema
        self.unreadable = UnreadableCounter(config.loader.max_unreadable)
        self.checkpoints = Checkpoints(config, world, self.state, self.troubles)
        self.watch = alarms.Watch(config, world, self.parts.recipe, self.troubles)
        self.profiler: Profiler | None = None
        self.step = 0
        self.consumed = 0
        # On a GPU a record is read one step later, so that its copy to the host has completed and reading never waits.
        self.lag = 1 if self.device.type == "cuda" else 0
        # Of each step: its record, the samples consumed by its end, and the count of unreadable images before it.
        self._unread: deque[tuple[StepRecord, int, dict[str, int]]] = deque()
        self.signals = StopSignals(self._log, self._lost_now)
        self._data_lost = False  # on some rank; known to all
        self.stopping = False  # a signal arrived on some rank; the same on all ranks

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything the next step depends on, and the tokenizer even if frozen, for sampling from a run folder."""
        modules = {"tokenizer", "latent_norm"} | {name for group in self.groups.values() for name in group.modules}
        named = self.parts.modules.named()
        state = {
            "modules": {name: module_state(named[name]) for name in sorted(modules) if name in named},
            "ema": {name: module_state(m) for name, m in self.ema.modules.items()} if self.ema else {},
            "optimizers": {name: optimizer_state(g.modules, g.optimizer) for name, g in self.groups.items()},
            "progress": {
                "step": self.step,
                "consumed": self.consumed,
                "unreadable": self.unreadable.state_dict(),
                "watch": self.watch.state_dict(),
            },
            "config": self.config.to_toml(),
            "version": version(),
            "classes": self.parts.classes.record(),
            "troubles": self.troubles.state_dict(),
        }
        m = self.parts.modules
        if m.copies or m.state:
            copies = {name: module_state(module) for name, module in m.copies.items()}
            state["recipe"] = {"copies": copies, "state": dict(m.state)}
        return state

    def load(self, path: Path) -> tuple[str, str]:
        """Load a checkpoint into the run; returns config and version that it was saved with."""
        state = self.checkpoints.load(path)
        named = self.parts.modules.named()
        for name, module in state["modules"].items():
            load_module_state(named[name], module)
        for name, module in state["ema"].items():
            load_module_state(self.ema.modules[name], module)
        for name, group in self.groups.items():
            load_optimizer_state(group.modules, group.optimizer, state["optimizers"][name])
        if "recipe" in state:
            for name, module in state["recipe"]["copies"].items():
                load_module_state(self.parts.modules.copies[name], module)
            self.parts.modules.state = state["recipe"]["state"]
        progress = state["progress"]
        self.step, self.consumed = progress["step"], progress["consumed"]
        self.unreadable.load_state_dict(progress["unreadable"])
        self.watch.load_state_dict(progress["watch"])
        if state["troubles"] is not None:
            self.troubles.load_state_dict(state["troubles"])
        return state["config"], state["version"]

    def resume(self) -> bool:
        """Load the newest valid checkpoint of the run folder; returns False if there is none.

        Raises:
            CheckpointError: there are checkpoints, but none is sound.
        """
        path = self.checkpoints.newest()
        if path is None:
            self.checkpoints.refuse_damaged()
            return False
        self.checkpoints.check_classes(path, self.parts.classes, self.accept_classes)
        written_with, wrote = self.load(path)
        self._log(f"resumed from {path} at step {self.step}")
        for change in changes(written_with, self.config.to_toml()):
            self._log(f"config changed since that checkpoint: {change}")
        if wrote not in ("", version()):
            self._log(f"changed since that checkpoint: titanrepa {wrote} -> {version()}")
        return True

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step, or until a signal arrives on any rank.

        Returns:
            Whether the run is complete.

        Raises:
            GuardStop: an alarm stopped the run, by policy.
        """
        resumed = self.resume()
        self._prepare_folder()  # after a resume that was refused, the folder is as it was
        if not resumed:
            with self.train_step.evaluating():
                prepare_latent_norm(self.config, self.parts, self.world)
            if self.ema is not None:
                self.ema.reset()
            self.parts.reset_copies()
        if self.step >= self.config.training.steps:
            total = self.config.training.steps
            self._log(f"already complete: step {self.step} of {total}; increase training.steps to continue")
            return True
        if self.evaluation is not None:
            self.evaluation.prepare(self.parts)
        flops = try_flops_per_image(self.config, self._meta, self.parts, self.world)
        reporter = Reporter(self.config, self.world, list(self.groups), self.step, flops, self.troubles)
        self.watch.mark = reporter.mark
        garbage = garbage_collected(self.config.training.gc_every)
        profiler = profiling(self.config, self.step, self.world, self.clock, reporter.stopwatch.outside)
        with contextlib.closing(reporter), profiler as self.profiler, self.signals, garbage as collect_garbage:
            try:
                while True:
                    with self._batches() as batches:
                        alarm = self._train(batches, reporter, collect_garbage)
                    if alarm is None:
                        break
                    self._roll_back(alarm)
                    reporter.begin(self.step)
                    reporter.mark(alarm.name, self.step)  # again: begin() has just hidden points of later steps
            except BaseException as error:
                together = self.world.size == 1 or self._data_lost
                rescue(error, self.checkpoints, self.step, whole=self.train_step.whole, together=together)
                raise
            self.checkpoints.finish()
        return self.step >= self.config.training.steps

    def _train(self, batches: Feed, reporter: Reporter, collect_garbage) -> Alarm | None:
        """Train until the last step, a stop, or an alarm that requires a rollback, which is returned."""
        total = self.config.training.steps
        while self.step < total and not self.stopping:
            if self.profiler is not None:
                self.profiler.before(self.step)
            counted = self.unreadable.state_dict()
            record = self.train_step(
                self.step, self._micro_batches(batches), self.signals.requested, lambda: batches.lost is not None
            )
            self.step += 1
            self.consumed += self.config.training.batch_size
            if self.profiler is not None:
                self.profiler.after()
            self._unread.append((record, self.consumed, counted))
            reporter.bar.update()
            collect_garbage(self.step)
            alarm, due = self._read(self.lag, batches), due_after(self.config, self.step)
            if alarm is None and (self.stopping or due):  # what follows needs all records
                alarm = self._read(0, batches)
            if alarm is not None:
                return alarm
            follow_up(self, {"log", "save"} if self.stopping else due, reporter, batches.waited_s)
        return None

    def _read(self, lag: int, batches: Feed) -> Alarm | None:
        """Read and check the records of all steps but the last ``lag``; returns an alarm, the same on every rank.

        Raises:
            Exception: of the data, on every rank; the run is back at the end of the last step that had data.
        """
        while len(self._unread) > lag:
            record, consumed, counted = self._unread.popleft()
            values = record.read()
            stop = values.pop("stop")
            if stop > 1:  # all ranks skipped this step and those after it
                self._unread.clear()
                self.step, self.consumed = record.step, consumed - self.config.training.batch_size
                self.unreadable.load_state_dict(counted)
                self._data_lost = True
                batches.raise_lost()
            self.stopping = self.stopping or stop > 0
            self.metrics.add(values)
            self.troubles.stepped(record.step + 1, values["skipped_steps"] > 0)
            alarm = self.watch.observe(record, same_on_all_ranks(values), self._order, consumed)
            if alarm is not None:
                return alarm
        return None

    def check_stop(self) -> None:
        """Raise Stopped if a signal has arrived on any rank. Collective."""
        if stop_requested(self.signals.requested):
            self.stopping = True
            raise Stopped

    def _lost_now(self) -> str:
        return f"steps after {saved} are lost" if (saved := self.checkpoints.saved) else "no step was saved"

    def _batches(self) -> Feed:
        feed = Feed(self.config, self.world, self.parts, self.unreadable, self.step, self.consumed)
        self._order, self._data_lost = feed.order, False
        return feed

    def _micro_batches(self, batches: Feed) -> Iterator:
        return batches.step()

    def _roll_back(self, alarm: Alarm) -> None:
        """Load the last checkpoint before the anomaly began, but continue with data that has not been seen yet.

        Raises:
            GuardStop: there is no such checkpoint.
        """
        consumed, rollbacks, came_from = self.consumed, self.watch.rollbacks + 1, self.step
        troubles = self.troubles.state_dict() | {"skipped_since": 0}
        self._unread.clear()
        self.metrics.read()
        self.checkpoints.finish()
        good = self.checkpoints.newest(up_to=alarm.onset)
        if good is None:
            self.watch.stop(alarm, f"there is no checkpoint from before step {alarm.onset}, where the anomaly began")
        self.load(good)
        self.watch.forget(self.step)
        skipped = consumed - self.consumed
        self.consumed, self.watch.rollbacks = consumed, rollbacks
        self.troubles.load_state_dict(troubles)
        # Never resume from checkpoints saved after the anomaly began. Save, so that a restart skips the data as well.
        self.checkpoints.discard(beyond=self.step)
        self.checkpoints.save(self.step)
        self._log(
            f"rolled back from step {came_from} to step {self.step} (rollback {rollbacks} of at most "
            f"{self.config.guard.max_rollbacks}); skipping {skipped} samples"
        )

    # -- reports -------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "config.toml") as partial:
            partial.write_text(self.config.to_toml(), encoding="utf-8")
        start_run_log()

    def _log(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)
