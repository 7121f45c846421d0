"""State first: whatever goes wrong while the state in memory is sound, the reached step is saved."""

import errno
import logging

import pytest
import torch

from components.checkpoint import CheckpointError
from components.data.loader import DataError
from components.distributed.parallel import World
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.run import pictures
from trainer.run.loop import Trainer

OPTIONS = ["--recipe.name=ldm", "--training.steps=6", "--run.checkpoint_every=0"]


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


@pytest.fixture
def make(toml, tmp_path):
    """Function that constructs a trainer of the run folder."""
    return lambda *options: Trainer(config.load(toml, [f"--run.dir={tmp_path / 'run'}", *OPTIONS, *options]), World())


def checkpoints(folder) -> list[str]:
    return sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())


def fail_in_step(trainer: Trainer, at: int, error: BaseException) -> None:
    """Raise ``error`` in the middle of step ``at``, counted from 1, after a backward pass."""
    original = trainer.parts.recipe.step

    def step(m, batch, random, update, k):
        original(m, batch, random, update, k)
        if k + 1 == at:
            raise error

    trainer.parts.recipe.step = step


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        KeyboardInterrupt(),
        OSError(errno.ESTALE, "Stale file handle"),
        RuntimeError("of a plugin"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_in_a_step_saves_the_one_before(make, tmp_path, error, caplog):
    trainer = make()
    fail_in_step(trainer, 4, error)
    with pytest.raises(type(error)):
        trainer.run()
    assert checkpoints(tmp_path) == ["step_00000003"]
    assert "saving step 3 before the run ends" in caplog.text
    after = make()
    after.run()
    whole = Trainer(config.load(str(tmp_path / "toy.toml"), [f"--run.dir={tmp_path / 'whole'}", *OPTIONS]), World())
    whole.run()
    for name, module in after.parts.modules.named().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, whole.parts.modules.named()[name].state_dict()[key]), f"{name}.{key}"


def test_an_error_during_the_update_says_why_nothing_is_saved(make, tmp_path, caplog):
    trainer = make()

    def after_step(m, finite, step):
        if step == 3:
            raise RuntimeError("in the middle of an update")

    trainer.parts.recipe.after_step = after_step
    with pytest.raises(RuntimeError, match="middle"):
        trainer.run()
    assert "step 3 is not saved: the error interrupted the update of the weights; there is no checkpoint" in caplog.text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_too_many_unreadable_images_save_the_step(toml, tmp_path, monkeypatch, capsys):
    from plugins.datasets.shapes import Shapes

    original, read = Shapes.__getitem__, []

    def item(self, index):
        read.append(index)
        sample = original(self, index)
        return sample._replace(unreadable=f"{index}.png") if len(read) > 50 else sample

    monkeypatch.setattr(Shapes, "__getitem__", item)
    monkeypatch.setattr(Shapes, "mirrored", item)
    monkeypatch.setattr("components.data.loader.UnreadableCounter.enough", 1)
    options = [*OPTIONS, "--sampling.images=1", "--latent_norm.images=8"]
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *options]) == 2
    assert "images are unreadable" in capsys.readouterr().err
    (saved,) = checkpoints(tmp_path)
    monkeypatch.undo()  # repaired: the images of the step that failed do not count
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *options]) == 0
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / saved}" in (tmp_path / "run" / "log.txt").read_text()


def test_data_that_is_gone_saves_the_step(make, tmp_path):
    trainer = make()
    original = type(trainer.parts.dataset).__getitem__
    read = []

    class Gone(type(trainer.parts.dataset)):
        def __getitem__(self, index):
            read.append(index)
            if len(read) > 60:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data")
            return original(self, index)

        mirrored = __getitem__

    trainer.parts.dataset.__class__ = Gone
    with pytest.raises(FileNotFoundError):
        trainer.run()
    assert len(checkpoints(tmp_path)) == 1 and trainer.checkpoints.saved == trainer.step > 0


def test_a_save_that_fails_while_rescuing_is_reported_with_the_first_error(make, caplog):
    trainer = make()
    fail_in_step(trainer, 3, DataError("the data is gone"))

    def save(step):
        raise CheckpointError("no space")

    trainer.checkpoints.save = save
    with pytest.raises(DataError, match="the data is gone"):
        trainer.run()
    assert "step 2 could not be saved: CheckpointError: no space; there is no checkpoint yet" in caplog.text


@pytest.mark.parametrize("async_checkpoints", [False, True])
def test_a_step_that_is_saved_is_not_saved_again(make, tmp_path, caplog, async_checkpoints):
    trainer = make("--run.checkpoint_every=2", f"--run.async_checkpoints={str(async_checkpoints).lower()}")
    fail_in_step(trainer, 3, RuntimeError("oops"))
    with pytest.raises(RuntimeError, match="oops"):
        trainer.run()
    assert checkpoints(tmp_path) == ["step_00000002"] and "before the run ends" not in caplog.text


# -- pictures and evaluation ---------------------------------------------------------------------------------------


def test_out_of_memory_in_pictures_costs_a_warning(toml, tmp_path, monkeypatch, capsys):
    def sample_images(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pictures, "sample_images", sample_images)
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS, "--sampling.every=2"]) == 3
    assert capsys.readouterr().out.strip().splitlines()[-1] == "Problems: failed: pictures 3x."
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("pictures failed: OutOfMemoryError: CUDA out of memory; training continues") == 1
    assert "step 6 of 6" in log and checkpoints(tmp_path) == ["step_00000006"]


def test_a_failed_evaluation_costs_a_warning(make, tmp_path, caplog):
    trainer = make()
    trainer.config.evaluation.every = 2

    class Evaluation:
        def prepare(self, parts):
            pass

        def __call__(self, *_):
            raise ValueError("the covariance has no square root")

    trainer.evaluation = Evaluation()
    assert trainer.run()
    assert trainer.troubles.failures == {"evaluation": 3}
    assert "evaluation failed: ValueError: the covariance has no square root" in caplog.text


@pytest.mark.parametrize("what", ["pictures", "evaluation"])
def test_a_signal_ends_pictures_and_evaluation_between_two_evaluations_of_the_denoiser(make, tmp_path, what):
    trainer = make("--sampling.every=2", "--sampling.steps=50")
    if what == "evaluation":
        trainer.config.sampling.every, trainer.config.evaluation.every = 0, 2

        class Evaluation:
            def prepare(self, parts):
                pass

            def __call__(self, parts, ema, check_stop):
                sampler = pictures.image_sampler(trainer.config, parts, ema, check_stop)
                for first in range(0, 1000, 10):
                    sampler(range(first, first + 10), parts.sampling_condition(torch.arange(first, first + 10)))

        trainer.evaluation = Evaluation()
    calls = []
    original = pictures.Stoppable.__call__

    def called(self, *inputs, **options):
        calls.append(trainer.step)
        if len(calls) == 3:
            trainer.signals.requested = True
        return original(self, *inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.Stoppable, "__call__", called)
        assert not trainer.run()
    assert calls == [2, 2, 2] and trainer.step == 2
    assert checkpoints(tmp_path) == ["step_00000002"]
    assert not trainer.troubles.failures


# -- damaged checkpoints --------------------------------------------------------------------------------------------


def flip(checkpoint) -> None:
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(make, toml, tmp_path, capsys):
    make("--run.checkpoint_every=2").run()
    folder = tmp_path / "run" / "checkpoints"
    assert len(checkpoints(tmp_path)) == 3
    for checkpoint in folder.iterdir():
        flip(checkpoint)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS]) == 2
    said = capsys.readouterr().err
    assert f"{folder} holds 3 checkpoints, none sound" in said and "name another run.dir" in said
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("async_checkpoints", [False, True])
def test_a_checkpoint_with_a_flipped_byte_does_not_count_for_retention(make, tmp_path, async_checkpoints, caplog):
    trainer = make(
        "--run.checkpoint_every=2",
        "--run.keep_checkpoints=2",
        f"--run.async_checkpoints={str(async_checkpoints).lower()}",
    )
    folder = tmp_path / "run" / "checkpoints"
    original = trainer.parts.recipe.step

    def step(m, batch, random, update, k):
        original(m, batch, random, update, k)
        if k == 4:
            trainer.checkpoints.finish()
            flip(folder / "step_00000004")

    trainer.parts.recipe.step = step
    trainer.run()
    # 4 is damaged: 2 stays, as the second sound one.
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000004", "step_00000006"]
    assert "step_00000004 does not count and stays" in caplog.text and "CRC-32" in caplog.text


# -- what is wrong with a run stands in its last line and its exit status -------------------------------------------


def test_a_run_that_skipped_its_last_steps_says_so_every_time(toml, tmp_path, monkeypatch, capsys):
    from plugins.recipes.ldm import Ldm

    original = Ldm.step

    def step(self, m, batch, random, update, k):
        if k >= 2:
            random = random | {"noise": random["noise"] * float("nan")}
        original(self, m, batch, random, update, k)

    monkeypatch.setattr(Ldm, "step", step)
    command = ["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS, "--guard.policy=warn", "--guard.skipped=3"]
    expected = (
        "Problems: 4 steps (67 %) were skipped because a value was not finite, the last ones since step 3 without a "
        "break; alarms: skipped (alarms/ of the run folder)."
    )
    for _ in range(2):  # the second time, the run is already complete
        assert main(command) == 3
        assert capsys.readouterr().out.strip().splitlines()[-1] == expected


def test_a_sound_run_has_no_problems(toml, tmp_path, capsys):
    assert main(["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS]) == 0
    assert "Problems" not in capsys.readouterr().out


def test_checkpoints_of_earlier_releases_have_no_troubles_and_load(make):
    trainer = make("--training.steps=1")
    trainer.run()
    old = {key: value for key, value in trainer.state().items() if key not in ("troubles", "version")}
    trainer.checkpoints.manager.save(1, old)
    again = make()
    assert again.resume() and again.step == 1 and again.troubles.skipped == 0


def test_the_log_file_has_the_lines_of_every_step(toml, tmp_path):
    main(["train", toml, f"--run.dir={tmp_path / 'run'}", *OPTIONS])
    lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if " of 6: " in line]
    assert len(lines) == 6 and "to go" in lines[2]
    logging.getLogger().handlers.clear()
