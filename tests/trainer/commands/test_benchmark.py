"""python -m trainer benchmark: times both variants in one run, names every phase, and reads no files."""

import argparse
import re
import weakref
from unittest import mock

import pytest
import torch

from components.distributed import parallel
from components.distributed.parallel import World
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.commands import benchmark
from trainer.run.step import Step

pytestmark = pytest.mark.long


@pytest.fixture
def toml(tmp_path, monkeypatch):
    # aot_eager traces as inductor does, in a fraction of the time.
    compile_units = parallel.compile_units
    monkeypatch.setattr(parallel, "compile_units", lambda module, backend: compile_units(module, "aot_eager"))
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    yield str(path)
    torch._dynamo.reset()


def row(table: str, title: str) -> list[float]:
    line = next(line for line in table.splitlines() if line.strip().startswith(title))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_eager_and_compiled_side_by_side(toml, capsys):
    absent = ["--tokenizer.checkpoint=absent.pt", "--training.threads=1"]
    assert main(["benchmark", toml, "--steps", "2", "--warmup", "1", *absent]) == 0
    table = capsys.readouterr().out
    step = row(table, "step (ms)")
    assert len(step) == 2 and min(step) > 0
    for title in ("data (ms)", "encoders (ms)", "tokenizer (ms)", "discriminator (ms)", "denoiser (ms)",
                  "optimizer (ms)", "images/s", "GiB peak memory"):  # fmt: skip
        assert len(row(table, title)) == 2
    assert "x as fast as eager" in table
    assert row(table, "images/s")[0] == pytest.approx(8 / step[0] * 1e3, rel=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_variant_leaves_nothing_in_memory(toml, compiled):
    """Otherwise the first variant's modules, optimizers and averages would count in the second's memory."""
    loaded = config.load(toml, [f"--training.compile={str(compiled).lower()}"])
    arguments = argparse.Namespace(steps=1, warmup=1, data=False)
    made, construct = [], Step.__init__

    def watched(self, recipe, modules, groups, **rest):
        construct(self, recipe, modules, groups, **rest)
        parts = [
            self,
            *modules.named().values(),
            *rest["ema"].modules.values(),
            *(g.optimizer for g in groups.values()),
        ]
        made.extend(weakref.ref(part) for part in parts)

    with mock.patch.object(Step, "__init__", watched):
        benchmark.measure(loaded, World(), arguments)
    assert len(made) > 8 and [ref() for ref in made if ref() is not None] == []


def test_real_data_and_one_variant(toml, capsys):
    assert main(["benchmark", toml, "--steps", "1", "--warmup", "0", "--only", "eager", "--data"]) == 0
    assert len(row(capsys.readouterr().out, "data (ms)")) == 1


def test_bad_steps(toml, capsys):
    assert main(["benchmark", toml, "--steps", "0"]) == 2
    assert "--steps: expected at least 1" in capsys.readouterr().err
