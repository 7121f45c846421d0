"""Injects the failures of long runs into training, and checks the alarm, the response and what is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from components.contracts import LossTerm
from components.distributed.parallel import World
from tests.support import toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.__main__ import main
from trainer.run.alarms import GuardStop
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

BATCH = 8
WATCHED = ["--guard.window=10", "--guard.patience=4", "--training.steps=24", "--run.checkpoint_every=8"]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def make(toml: str, folder: Path, *options: str, world: World | None = None) -> Trainer:
    return Trainer(config.load(toml, [f"--run.dir={folder}", *options]), world or World())


def poison(trainer: Trainer, positions: range) -> None:
    """Set the images at these positions of the data stream to NaN."""
    original = trainer._micro_batches

    def micro_batches(batches):
        for batch, draws in original(batches):
            bad = trainer.consumed in positions
            yield (batch._replace(images=batch.images * math.nan) if bad else batch), draws

    trainer._micro_batches = micro_batches


def tamper(trainer: Trainer, group: str, change) -> None:
    """Pass each term of a group's loss through ``change(step, name, value)`` before they are summed."""
    step = trainer.parts.recipe.step

    def stepped(m, batch, draws, update, k):
        def changed(name, terms, **extra):
            if name == group:
                terms = {n: LossTerm(w, change(k, n, v)) for n, (w, v) in terms.items()}
            update(name, terms, **extra)

        step(m, batch, draws, changed, k)

    trainer.parts.recipe.step = stepped


def diagnoses(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "alarms").glob("*.json"))]


def measured(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def nan_on_rank_1(rank: int, world: int, toml: str, folder: str) -> dict:
    trainer = make(toml, Path(folder), "--training.steps=4", world=World(rank, world))
    tamper(trainer, "denoiser", lambda k, n, v: v * math.nan if (rank, k, n) == (1, 2, "velocity") else v)
    before = {}
    original = trainer.train_step

    def step(k, *arguments):
        if k == 2:
            before.update({n: p.full_tensor().clone() for n, p in trainer.parts.modules.denoiser.named_parameters()})
        record = original(k, *arguments)
        if k == 2:
            after = {n: p.full_tensor() for n, p in trainer.parts.modules.denoiser.named_parameters()}
            before["unchanged"] = all(torch.equal(before[n], after[n]) for n in after)
        return record

    step.evaluating, step.whole = original.evaluating, True
    trainer.train_step = step
    trainer.run()
    weights = {n: p.full_tensor() for n, p in trainer.parts.modules.denoiser.named_parameters()}
    return {"unchanged": before["unchanged"], "weights": weights, "step": trainer.step}


def test_nan_in_one_ranks_loss_skips_the_step_on_all_ranks(toml, tmp_path):
    found = run_ranks(nan_on_rank_1, 2, toml, str(tmp_path / "run"))
    assert [f["unchanged"] for f in found] == [True, True] and [f["step"] for f in found] == [4, 4]
    assert all(torch.equal(w, found[1]["weights"][n]) for n, w in found[0]["weights"].items())
    assert all(w.isfinite().all() for w in found[0]["weights"].values())
    assert measured(tmp_path / "run", "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 0}
    assert list(measured(tmp_path / "run", "denoiser/velocity")) == [1, 2, 4], "no NaN among the curves"


def test_an_infinite_gradient_behind_finite_losses_skips_the_step(toml, tmp_path):
    trainer = make(toml, tmp_path / "run", "--training.steps=4")
    weight = trainer.parts.modules.denoiser.blocks[0].attn.qkv.weight
    calls = iter(range(100))
    weight.register_hook(lambda g: g * math.inf if next(calls) == 1 else g)
    trainer.run()
    assert measured(tmp_path / "run", "skipped_steps") == {1: 0, 2: 1, 3: 0, 4: 0}
    assert measured(tmp_path / "run", "denoiser/loss")[2] < math.inf and weight.isfinite().all()


def test_rollback_skips_poisoned_data_and_completes(toml, tmp_path, caplog):
    options = ["--guard.policy=rollback", "--guard.skipped=2", "--training.steps=8"]
    trainer = make(toml, tmp_path / "run", *options)
    poison(trainer, range(4 * BATCH, 6 * BATCH))
    with caplog.at_level("INFO", logger="titanrepa"):
        assert trainer.run()
    # Steps 4 and 5 saw NaN; the run returned to step 4 and continued with the data after them.
    assert (trainer.step, trainer.consumed, trainer.watch.rollbacks) == (8, 6 * BATCH + 4 * BATCH, 1)
    assert "rolled back from step 6 to step 4 (rollback 1 of at most 3); skipping 16 samples" in caplog.text
    assert all(p.isfinite().all() for p in trainer.parts.modules.denoiser.parameters())
    (found,) = diagnoses(tmp_path / "run")
    assert found["alarm"]["name"] == "skipped" and found["alarm"]["onset"] == 4 and found["step"] == 5
    # 40 samples per epoch, 8 per step: step 5 starts the second epoch.
    order = trainer._order
    assert [tuple(s) for s in found["samples_epoch_and_index"]] == [order.at(p) for p in range(40, 48)]
    assert found["values"]["tokenizer/loss"] == "nan" and found["first_anomaly"]["step"] == 4
    assert found["first_anomaly"]["module"] == "tokenizer" and found["worst_module"] == "tokenizer"
    layers = found["layers_of_worst_module"]
    assert "tokenizer.encoder.conv_in.weight" in layers and layers["tokenizer.encoder.conv_in.weight"] == "nan"
    assert [row["step"] for row in found["last_steps"]] == list(range(6))


def test_a_rolled_back_run_that_is_killed_goes_on_behind_the_poison(toml, tmp_path):
    """The checkpoint saved after a rollback contains the new data position and the number of rollbacks."""
    options = ["--guard.policy=rollback", "--guard.skipped=2"]
    whole = make(toml, tmp_path / "whole", *options, "--training.steps=8")
    poison(whole, range(4 * BATCH, 6 * BATCH))
    whole.run()

    class Killed(Exception):
        pass

    first = make(toml, tmp_path / "parts", *options, "--training.steps=8")
    poison(first, range(4 * BATCH, 6 * BATCH))
    original = first._roll_back

    def killed(alarm):
        original(alarm)
        raise Killed

    first._roll_back = killed
    with pytest.raises(Killed):
        first.run()
    second = make(toml, tmp_path / "parts", *options, "--training.steps=8")
    second.run()
    assert second.watch.rollbacks == 1 and second.consumed == whole.consumed
    last = measured(tmp_path / "whole", "denoiser/loss")[8]
    assert measured(tmp_path / "parts", "denoiser/loss")[8] == last


def test_what_was_saved_during_the_trouble_is_not_gone_on_from(toml, tmp_path):
    """Alarms with patience fire late: checkpoints saved since the onset must be removed."""
    options = [*WATCHED, "--guard.policy=rollback", "--run.checkpoint_every=3", "--run.keep_checkpoints=9"]
    trainer = make(toml, tmp_path / "run", *options, "--training.steps=20", "--guard.max_rollbacks=1")
    dying = {"yes": True}
    tamper(trainer, "discriminator", lambda k, n, v: v * 1e-4 if dying["yes"] and k >= 15 else v)
    original = trainer._roll_back

    def rolled_back(alarm):
        original(alarm)
        dying["yes"] = False
        steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").iterdir()]
        assert max(steps) == trainer.step == 15

    trainer._roll_back = rolled_back
    assert trainer.run()
    assert [d["alarm"]["name"] for d in diagnoses(tmp_path / "run")] == ["discriminator"]


def test_after_too_many_rollbacks_the_run_stops_with_a_report(toml, tmp_path):
    options = ["--guard.policy=rollback", "--guard.skipped=2", "--guard.max_rollbacks=1", "--training.steps=12"]
    trainer = make(toml, tmp_path / "run", *options)
    poison(trainer, range(4 * BATCH, 100 * BATCH))
    with pytest.raises(GuardStop) as stopped:
        trainer.run()
    report = str(stopped.value)
    for part in ("2 consecutive steps were skipped", "guard.max_rollbacks = 1", " at step 4: ", "the last steps",
                 "alarms/step_00000005_skipped.json", "grad_norm/denoiser nan"):  # fmt: skip
        assert part in report, report
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()
    assert all(p.isfinite().all() for p in trainer.parts.modules.denoiser.parameters())


def test_without_a_checkpoint_from_before_a_rollback_stops_the_run(toml, tmp_path):
    options = ["--guard.policy=rollback", "--guard.skipped=2", "--run.checkpoint_every=0"]
    trainer = make(toml, tmp_path / "run", *options)
    poison(trainer, range(100 * BATCH))
    with pytest.raises(GuardStop, match="there is no checkpoint from before step 0"):
        trainer.run()


def test_policy_stop_ends_the_command_with_the_report(toml, tmp_path, capsys, monkeypatch):
    run = Trainer.run

    def poisoned(self):
        poison(self, range(2 * BATCH, 100 * BATCH))
        return run(self)

    monkeypatch.setattr(Trainer, "run", poisoned)
    options = ["--guard.policy=stop", "--guard.skipped=1", f"--run.dir={tmp_path / 'run'}"]
    assert main(["train", toml, *options]) == 2
    error = capsys.readouterr().err
    assert "the guard stopped the run at step 2" in error and "Traceback" not in error


def test_a_dying_discriminator_is_named(toml, tmp_path, caplog):
    trainer = make(toml, tmp_path / "run", *WATCHED)
    tamper(trainer, "discriminator", lambda k, n, v: v * 1e-4 if k >= 15 else v)
    assert trainer.run(), "the policy is to warn"
    found = diagnoses(tmp_path / "run")[0]
    assert found["alarm"]["name"] == "discriminator" and found["alarm"]["onset"] == 15
    assert "ALARM discriminator at step 18" in caplog.text


def test_collapsing_latents_are_named(toml, tmp_path):
    """Collapse as the diffusion loss causes it in a tokenizer, here with a shrinking posterior."""
    trainer = make(toml, tmp_path / "run", *WATCHED, "--recipe.name=naive_e2e", "--latent_norm.momentum=0.9")
    quant, step = trainer.parts.modules.tokenizer.quant_conv, trainer.parts.recipe.step

    def shrinking(m, batch, draws, update, k):
        if k >= 12:
            with torch.no_grad():
                quant.weight.mul_(0.5)
                quant.bias[:4].mul_(0.5)
                quant.bias[4:].sub_(1.0)  # log-variances
        step(m, batch, draws, update, k)

    trainer.parts.recipe.step = shrinking
    trainer.run()
    assert "latent_variance" in [d["alarm"]["name"] for d in diagnoses(tmp_path / "run")]


def test_vanishing_gradients_are_named_with_the_module(toml, tmp_path):
    trainer = make(toml, tmp_path / "run", *WATCHED, "--training.steps=26")
    tamper(trainer, "denoiser", lambda k, n, v: v * 1e-6 if k >= 21 else v)
    trainer.run()
    alarms = {d["alarm"]["metric"]: d for d in diagnoses(tmp_path / "run")}
    assert alarms["grad_norm/denoiser"]["alarm"]["name"] == "collapse"
    assert alarms["grad_norm/denoiser"]["alarm"]["onset"] == 21


def test_a_spike_is_named_with_its_samples_and_marked_in_tensorboard(toml, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(toml, tmp_path / "run", *WATCHED)
    tamper(trainer, "denoiser", lambda k, n, v: v * 1e3 if k == 14 else v)
    trainer.run()
    found = diagnoses(tmp_path / "run")[0]
    assert found["alarm"]["name"] == "spike" and found["step"] == 14 and found["worst_module"] == "denoiser"
    assert len(found["samples_epoch_and_index"]) == BATCH
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    marks = [(e.step, e.value) for e in events.Scalars("alarms/spike")]
    assert (15, 1.0) in marks


def test_a_healthy_run_raises_no_alarm(toml, tmp_path):
    trainer = make(toml, tmp_path / "run", *WATCHED)
    trainer.run()
    assert not diagnoses(tmp_path / "run")
