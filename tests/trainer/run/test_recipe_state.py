"""Tensors that a recipe keeps between steps: restored exactly on resume and rollback, unchanged by skipped steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from components import registry
from components.contracts import LossTerm, Modules
from components.distributed.parallel import World
from plugins.recipes.ldm import Ldm
from tests.support import toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

BATCH = 8
OPTIONS = ["--recipe.name=weighted", "--training.precision=fp64"]


class Weighted(Ldm):
    """Latent diffusion whose loss grows with the number of applied steps; keeps it, and the sum of the biases."""

    def init_state(self, m: Modules) -> dict[str, Tensor]:
        return {"applied": torch.zeros((), dtype=torch.int64), "sums": torch.zeros(2, dtype=torch.float64)}

    def step(self, m, batch, random, update, step) -> None:
        def grown(group: str, terms: dict[str, LossTerm]) -> None:
            factor = 1 + m.state["applied"] + m.state["sums"].sum()
            update(group, {name: LossTerm(weight, factor * value) for name, (weight, value) in terms.items()})

        super().step(m, batch, random, grown, step)

    def after_step(self, m: Modules, finite: Tensor, step: int) -> None:
        m.state["applied"] += finite  # in place
        bias = m.denoiser.final_layer.linear.bias
        total = (bias.full_tensor() if hasattr(bias, "full_tensor") else bias).detach().sum()
        m.state["sums"] = torch.where(finite, torch.stack([m.state["sums"][1], total]), m.state["sums"])  # replaced


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry.discover("plugins")
    monkeypatch.setattr(registry.recipes, "_plugins", dict(registry.recipes._plugins))
    registry.recipes.register("weighted")(Weighted)


@pytest.fixture
def toml(tmp_path) -> str:
    (tmp_path / "toy.toml").write_text(toys.TOML)
    return str(tmp_path / "toy.toml")


def make(toml: str, folder: Path, *options: str) -> Trainer:
    return Trainer(config.load(toml, [f"--run.dir={folder}", *OPTIONS, *options]), World())


def poison(trainer: Trainer, positions: range) -> None:
    """Set the images at these positions of the data stream to NaN."""
    original = trainer._micro_batches

    def micro_batches(batches):
        for batch, numbers in original(batches):
            bad = trainer.consumed in positions
            yield (batch._replace(images=batch.images * math.nan) if bad else batch), numbers

    trainer._micro_batches = micro_batches


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["denoiser/loss"] for line in lines if "denoiser/loss" in line}


def assert_same_state(a: Trainer, b: Trainer) -> None:
    ours, theirs = a.parts.modules.state, b.parts.modules.state
    assert ours.keys() == theirs.keys() == {"applied", "sums"}
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    weights = zip(a.parts.modules.denoiser.parameters(), b.parts.modules.denoiser.parameters())
    assert all(torch.equal(x, y) for x, y in weights)


def test_a_resumed_run_goes_on_with_the_state(toml, tmp_path):
    whole = make(toml, tmp_path / "whole", "--training.steps=5")
    whole.run()
    assert whole.parts.modules.state["applied"] == 5 and whole.parts.modules.state["sums"].all()
    make(toml, tmp_path / "parts", "--training.steps=3").run()
    resumed = make(toml, tmp_path / "parts", "--training.steps=5")
    resumed.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_same_state(whole, resumed)


def test_a_background_save_holds_the_state_of_its_step(toml, tmp_path):
    """The state changes in place while earlier checkpoints are being written."""
    trainer = make(toml, tmp_path / "run", "--training.steps=6", "--run.checkpoint_every=1", "--run.keep_checkpoints=9")
    trainer.run()
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        trainer.load(path)
        assert trainer.parts.modules.state["applied"] == trainer.step == int(path.name[5:])


def test_a_skipped_step_leaves_the_state(toml, tmp_path):
    trainer = make(toml, tmp_path / "run", "--training.steps=3")
    poison(trainer, range(BATCH, 2 * BATCH))
    trainer.run()
    assert trainer.parts.modules.state["applied"] == 2
    assert trainer.parts.modules.state["sums"].isfinite().all()


def test_a_rollback_restores_the_state(toml, tmp_path):
    options = ["--guard.policy=rollback", "--guard.skipped=2", "--training.steps=8"]
    trainer = make(toml, tmp_path / "run", *options)
    poison(trainer, range(5 * BATCH, 7 * BATCH))
    seen = {}
    original = trainer._roll_back

    def rolled_back(alarm):
        state = trainer.parts.modules.state
        seen["before"] = state["applied"].item()
        original(alarm)
        seen["after"], seen["step"] = trainer.parts.modules.state["applied"].item(), trainer.step

    trainer._roll_back = rolled_back
    assert trainer.run() and trainer.watch.rollbacks == 1
    # Step 4 (counted from 0) was applied after the checkpoint of step 4, and steps 5 and 6 saw NaN.
    assert seen == {"before": 5, "after": 4, "step": 4}
    assert trainer.parts.modules.state["applied"] == 8


def on_ranks(rank: int, world: int, toml: str) -> dict[str, Tensor]:
    registry.discover("plugins")
    if "weighted" not in {plugin.name for plugin in registry.recipes}:
        registry.recipes.register("weighted")(Weighted)
    options = [f"--run.dir={Path(toml).parent}/{world}", *OPTIONS, "--run.async_checkpoints=false"]
    for steps in (2, 4):
        trainer = Trainer(config.load(toml, [*options, f"--training.steps={steps}"]), World(rank, world))
        trainer.run()
    return trainer.parts.modules.state


def test_two_ranks_keep_the_same_state_as_one(toml):
    one = on_ranks(0, 1, toml)
    for found in run_ranks(on_ranks, 2, toml):
        assert found["applied"] == one["applied"] == 4
        torch.testing.assert_close(found["sums"], one["sums"], rtol=1e-8, atol=0)
