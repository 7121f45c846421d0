"""The same TOML on 1, 2 and 4 ranks: the same images, the same draws, the same losses and weights."""

import json

import pytest

from tests import toys
from tests.ranks import run_ranks


def train(rank: int, world: int, toml: str, folder: str, options: list[str]) -> None:
    import torch

    from components.parallel import World
    from trainer import config
    from trainer.loop import Trainer

    torch.set_num_threads(1)
    loaded = config.load(toml, [f"--run.dir={folder}", *options])
    Trainer(loaded, World(rank, world)).run()


def numbers(folder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e"])
def test_losses_agree_between_1_2_and_4_ranks(tmp_path, recipe):
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    options = [f"--recipe.name={recipe}", "--training.precision=fp64", "--training.steps=3", "--ema.tokenizer"]
    for world in (1, 2, 4):
        run_ranks(train, world, str(toml), str(tmp_path / str(world)), options)
    one = numbers(tmp_path / "1")
    for world in (2, 4):
        for a, b in zip(one, numbers(tmp_path / str(world)), strict=True):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-8, abs=1e-10), f"{world} ranks, {name}"


def test_saved_at_2_ranks_resumed_at_1(tmp_path):
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    options = ["--training.precision=fp64"]
    run_ranks(train, 1, str(toml), str(tmp_path / "whole"), [*options, "--training.steps=4"])
    run_ranks(train, 2, str(toml), str(tmp_path / "parts"), [*options, "--training.steps=2"])
    run_ranks(train, 1, str(toml), str(tmp_path / "parts"), [*options, "--training.steps=4"])
    for a, b in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "parts"), strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-8, abs=1e-10), name
