"""python -m trainer benchmark: both variants in one run, every phase named, nothing read from files."""

import re

import pytest
import torch

from components import parallel
from tests import toys
from trainer.__main__ import main


@pytest.fixture
def toml(tmp_path, monkeypatch):
    # aot_eager traces as inductor does, in a fraction of its time.
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
    for title in ("data", "encoders", "tokenizer forward", "discriminator forward", "denoiser forward", "optimizers",
                  "images/s", "GiB peak memory"):  # fmt: skip
        assert len(row(table, title)) == 2
    assert "x as fast as eager" in table
    assert row(table, "images/s")[0] == pytest.approx(8 / step[0] * 1e3, rel=0.01)


def test_real_data_and_one_variant(toml, capsys):
    assert main(["benchmark", toml, "--steps", "1", "--warmup", "0", "--only", "eager", "--data"]) == 0
    assert len(row(capsys.readouterr().out, "data (ms)")) == 1


def test_bad_steps(toml, capsys):
    assert main(["benchmark", toml, "--steps", "0"]) == 2
    assert "--steps: expected at least 1" in capsys.readouterr().err
