"""Images reach the networks in the run's precision and memory format, in every command."""

import argparse

import pytest
import torch

from components.contracts import Batch
from components.distributed.parallel import World
from plugins.recipes.ldm import Ldm
from tests.support import toys
from trainer import config
from trainer.commands import benchmark
from trainer.estimate import measured_peak as measure
from trainer.estimate.dry_run import dry_run
from trainer.run.loop import Trainer
from trainer.run.step import Step

COMMANDS = {
    "train": lambda c: Trainer(c, World()).run(),
    "benchmark": lambda c: benchmark.measure(c, World(), argparse.Namespace(data=False, warmup=0, steps=1)),
    "benchmark --data": lambda c: benchmark.measure(c, World(), argparse.Namespace(data=True, warmup=0, steps=1)),
    "check": lambda c: dry_run(c, 1, 1, bf16=False),
    "check --measure": lambda c: measure.measure_peak(c, World()),
}


class Seen(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_command_gives_the_recipe_what_the_config_says(tmp_path, monkeypatch, command, channels_last):
    def step(self, m, batch, draws, update, k):
        raise Seen(batch.images.dtype, batch.images.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(Ldm, "step", step)
    monkeypatch.setattr(measure, "_return_freed_memory", lambda: None)  # it would change the process permanently
    (tmp_path / "toy.toml").write_text(toys.TOML)
    options = [f"--run.dir={tmp_path / 'run'}", "--recipe.name=ldm", "--training.precision=fp64",
               "--training.threads=1", f"--training.channels_last={str(channels_last).lower()}"]  # fmt: skip
    with pytest.raises(Seen) as seen:
        COMMANDS[command](config.load(str(tmp_path / "toy.toml"), options))
    assert seen.value.args == (torch.float64, channels_last)


def test_a_step_without_images_is_left_alone():
    """A step on cached latents may have no images."""
    seen = []

    class Recipe:
        def step(self, m, batch, draws, update, k):
            seen.append(batch.images)
            update("denoiser", {})

    step = Step(Recipe(), toys.modules(), {}, ema=None, accumulation=1, autocast_dtype=None,
                device=torch.device("cpu"), image_dtype=torch.float64, memory_format=torch.channels_last)  # fmt: skip
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KeyError, match="denoiser"):
        step(0, [(Batch(None, labels), None)])
    assert seen == [None]
