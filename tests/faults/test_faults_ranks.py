"""Faults of one rank among several: what all ranks save, and what is said."""

import contextlib
import json
from pathlib import Path

import pytest

from components.data.loader import DataError
from components.distributed.parallel import World
from tests.support import toys
from tests.support.ranks import run_ranks
from trainer import config
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

OPTIONS = ["--recipe.name=ldm", "--training.steps=6", "--run.checkpoint_every=0"]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def make(rank: int, world: int, toml: str, folder: str, *options: str) -> Trainer:
    return Trainer(config.load(toml, [f"--run.dir={folder}", *OPTIONS, *options]), World(rank, world))


def _lose_data(rank: int, world: int, toml: str, folder: str, lag: int) -> tuple:
    trainer = make(rank, world, toml, folder)
    trainer.lag = lag
    if rank == 1:
        item, read = type(trainer.parts.dataset).__getitem__, []

        class Gone(type(trainer.parts.dataset)):
            def __getitem__(self, index):
                read.append(index)
                if len(read) > 25:
                    raise OSError("the data is gone")
                return item(self, index)

            mirrored = __getitem__

        trainer.parts.dataset.__class__ = Gone
    try:
        trainer.run()
    except (OSError, DataError) as error:
        return type(error).__name__, str(error), trainer.step, trainer.checkpoints.saved
    return ()


@pytest.mark.parametrize("lag", [0, 1])
def test_data_lost_on_one_rank_ends_all_with_the_step_saved(toml, tmp_path, lag):
    first, second = run_ranks(_lose_data, 2, toml, str(tmp_path / "run"), lag)
    assert first[:2] == ("DataError", "rank 1 cannot read its data: OSError: the data is gone")
    assert second[:2] == ("OSError", "the data is gone")
    assert first[2:] == second[2:] and first[2] == first[3] > 0
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert path.name == f"step_{first[2]:08d}"
    # The run goes on as if nothing had happened.
    _, resumed = run_ranks(_finish, 2, toml, str(tmp_path / "run"))
    _, whole = run_ranks(_finish, 2, toml, str(tmp_path / "whole"))
    assert resumed == whole


def _finish(rank: int, world: int, toml: str, folder: str) -> dict:
    trainer = make(rank, world, toml, folder)
    trainer.run()
    last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in last.items() if not key.startswith(("speed/", "time/", "memory/"))}


def _fail_alone(rank: int, world: int, toml: str, folder: str) -> str:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("titanrepa").addHandler(handler)
    trainer = make(rank, world, toml, folder)
    step = trainer.parts.recipe.step

    def failing(m, batch, random, update, k):
        if k == 3 and rank == 1:
            raise RuntimeError("on one rank")
        step(m, batch, random, update, k)

    trainer.parts.recipe.step = failing
    with contextlib.suppress(RuntimeError):
        trainer.run()
    return "\n".join(lines) if rank else ""


def test_a_rank_that_fails_alone_says_why_nothing_is_saved(toml, tmp_path):
    with pytest.raises(Exception):  # noqa: B017, the other rank loses this one
        run_ranks(_fail_and_say, 2, toml, str(tmp_path / "run"))
    said = (tmp_path / "said").read_text()
    assert "step 3 is not saved: this rank failed alone, and a save needs all; there is no checkpoint yet" in said


def _fail_and_say(rank: int, world: int, toml: str, folder: str) -> None:
    said = _fail_alone(rank, world, toml, folder)
    if rank == 1:
        Path(folder).with_name("said").write_text(said)
        raise SystemExit(1)


def _nan_on_one_rank(rank: int, world: int, toml: str, folder: str) -> None:
    trainer = make(rank, world, toml, folder, "--guard.skipped=2", "--guard.policy=warn")
    step = trainer.parts.recipe.step

    def broken(m, batch, random, update, k):
        if k >= 3 and rank == 1:
            random = random | {"noise": random["noise"] * float("nan")}
        step(m, batch, random, update, k)

    trainer.parts.recipe.step = broken
    trainer.run()


def test_an_alarm_says_which_rank_is_not_finite(toml, tmp_path):
    run_ranks(_nan_on_one_rank, 2, toml, str(tmp_path / "run"))
    (file,) = (tmp_path / "run" / "alarms").iterdir()
    found = json.loads(file.read_text())["not_finite_on_ranks"]
    assert list(found) == ["1"] and "denoiser/loss" in found["1"]


def _fail_in_pictures(rank: int, world: int, toml: str, folder: str) -> tuple:
    from trainer.run.report import Reporter

    trainer = make(rank, world, toml, folder, "--sampling.every=2")
    draw = Reporter.draw

    def failing(self, *arguments):
        draw(self, *arguments)
        if rank == 1:
            raise MemoryError("on one rank")

    Reporter.draw = failing
    try:
        return trainer.run(), trainer.step, trainer.troubles.failures
    finally:
        Reporter.draw = draw


def test_pictures_that_fail_on_one_rank_count_on_all(toml, tmp_path):
    assert run_ranks(_fail_in_pictures, 2, toml, str(tmp_path / "run")) == [(True, 6, {"pictures": 3})] * 2
