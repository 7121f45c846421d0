"""The sample command: the same images on any number of ranks, after any interruption, and never a mixture."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from components.contracts import Condition, Denoiser, DenoiserOutput
from components.data.pixels import to_float, to_uint8
from components.diffusion.flow import Flow
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.samplers import Guidance, sample_ode, sample_sde
from components.distributed.parallel import World
from components.version import version
from tests.support import toys
from tests.support.ranks import PRELOAD, run_ranks
from trainer import config
from trainer.__main__ import main
from trainer.models.source import open_source
from trainer.run.loop import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps with both checkpoints."""
    folder = tmp_path_factory.mktemp("sample")
    toml = folder / "toy.toml"
    toml.write_text(toys.TOML)
    options = ["--training.steps=2", "--run.checkpoint_every=1", f"--run.dir={folder}/run", "--ema.decay=0.5"]
    # A large step away from the initial weights, for which neither labels nor guidance have an effect.
    Trainer(config.load(str(toml), [*options, "--optimizer.denoiser.lr=0.1"]), World()).run()
    return folder / "run"


def sample(*words) -> int:
    return main(["sample", *map(str, words)])


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


def _sample_on_rank(rank: int, world: int, words: list[str]) -> int:
    import argparse

    from trainer.commands import sample as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.sample(parser.parse_args(words), [], World(rank, world))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> dict[str, bytes]:
    """18 images in batches of 4, from one process without interruption."""
    out = tmp_path_factory.mktemp("whole") / "images"
    assert sample(run, "--num-samples=18", "--batch-size=4", "--out", out) == 0
    return pngs(out)


@pytest.mark.long
def test_two_and_four_ranks_write_what_one_does(run, whole, tmp_path):
    assert len(whole) == 18
    for world in (2, 4):
        out = tmp_path / str(world)
        run_ranks(_sample_on_rank, world, [str(run), "--num-samples=18", "--batch-size=4", f"--out={out}"])
        assert pngs(out) == whole
        assert (out / "grid.png").is_file()


def test_killed_it_goes_on_with_what_is_missing(run, whole, tmp_path):
    out = tmp_path / "images"
    words = ["sample", str(run), "--num-samples=18", "--batch-size=4", f"--out={out}"]
    multiprocessing.set_forkserver_preload(PRELOAD)
    child = multiprocessing.get_context("forkserver").Process(target=_slowly, args=(words,))
    child.start()
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    written = pngs(out)
    assert 5 <= len(written) < 18
    assert not (out / "samples.npz").exists()
    times = {name: (out / name).stat().st_mtime_ns for name in written}

    assert main(words) == 0
    assert pngs(out) == whole
    assert all((out / name).stat().st_mtime_ns == before for name, before in times.items())


def _slowly(words: list[str]) -> None:
    torch.set_num_threads(1)
    from trainer.models.sample_folder import SampleFolder

    write = SampleFolder.write

    def slow(self, i, image):
        time.sleep(0.2)
        write(self, i, image)

    SampleFolder.write = slow
    main(words)


def test_more_images_can_be_added_and_the_archive_holds_them(run, whole, tmp_path):
    out = tmp_path / "images"
    assert sample(run, "--num-samples=6", "--batch-size=4", "--out", out) == 0
    assert sample(run, "--num-samples=18", "--out", out) == 0  # the batch size is read from the folder
    assert pngs(out) == whole
    with np.load(out / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8
    assert images.shape == (18, 32, 32, 3)
    for i in (0, 17):
        assert np.array_equal(images[i], np.array(PIL.Image.open(out / f"{i:06d}.png")))
    settings = json.loads((out / "samples.json").read_text())
    assert settings["step"] == 2
    assert settings["run"] == str(run)
    assert settings["titanrepa_version"] == version()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--seed=1"], "seed: 0 in the folder, 1 now"),
        (["--guidance=1"], "guidance: [4.0"),
        (["--weights=online"], "model:"),
        (["--step=1"], "step: 2 in the folder, 1 now"),
        (["--labels=3"], "labels: balanced in the folder, [3] now"),
    ],
)
def test_a_folder_never_mixes_settings(run, whole, tmp_path, capsys, words, key):
    out = tmp_path / "images"
    shutil.copytree(run, tmp_path / "run")
    assert sample(run, "--num-samples=4", "--out", out) == 0
    before = pngs(out)
    assert sample(run, "--num-samples=8", "--out", out, *words) == 2
    message = capsys.readouterr().err
    assert key in message
    assert "--out" in message
    assert pngs(out) == before


def test_the_options_change_the_images(run, tmp_path):
    seen = {}
    for name, words in {
        "base": [],
        "online": ["--weights=online"],
        "step": ["--step=1"],
        "seed": ["--seed=1"],
        "method": ["--method=heun"],
        "sde": ["--method=sde", "--steps=3"],
        "class": ["--labels=7"],
        "guidance": ["--guidance=1"],
        "interval": ["--guidance-high=0.6"],
        "guide": [f"--guide={run}/checkpoints/step_00000001"],
    }.items():
        assert sample(run, "--num-samples=2", f"--out={tmp_path}/{name}", "--no-npz", *words) == 0
        seen[name] = pngs(tmp_path / name)["000000.png"]
        assert not (tmp_path / name / "samples.npz").exists()
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels=10"], "from 0 to 9"),
        (["--labels=cat"], "no class 'cat'; expected balanced, random, dataset, or class indices from 0 to 9 or names"),
        (["--guidance=0.5"], "--guidance = 0.5"),
        (["--guidance-low=2"], "--guidance-low = 2"),
        (["--steps=0"], "--steps = 0"),
        (["--method=sde", "--steps=1"], "sampling.steps = 1: the sampler 'sde' needs at least 2"),
        (["--method=rk4"], "sampling.method = 'rk4': no such sampler"),
        (["--num-samples=0"], "--num-samples=0"),
        (["--step=7"], "step_00000007"),
        (["--denoiser.wdith=3"], "did you mean 'width'"),
        (["--nmu=3"], "nmu"),
    ],
)
def test_a_wrong_option_is_named(run, capsys, tmp_path, words, message):
    assert sample(run, "--out", tmp_path / "images", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_what_is_no_model_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "other" / "checkpoints").mkdir(parents=True)
    assert sample("outputs/othre") == 2
    message = capsys.readouterr().err
    assert "'outputs/othre' is not a trained model (it does not exist)" in message
    assert "outputs/other" in message
    assert sample("outputs/other") == 2
    assert "no valid checkpoint" in capsys.readouterr().err
    (tmp_path / "toy.toml").write_text(toys.TOML)
    assert sample("toy.toml") == 2
    assert "holds no trained tokenizer; set tokenizer.checkpoint" in capsys.readouterr().err


def test_foreign_images_are_left_alone(run, tmp_path, capsys):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    assert sample(run, "--num-samples=2", "--out", tmp_path) == 2
    assert "images but no samples.json" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["holiday.png"]


def test_an_image_is_that_of_its_number_in_any_company(run):
    m = open_source(str(run), World()).parts
    plan = SamplingPlan(steps=3, guidance=Guidance(2.0), seed=5)
    sampler = ImageSampler(plan, m.recipe, m.modules, m.latent)
    together = sampler([3, 8, 1], Condition(torch.tensor([0, 4, 2])))
    alone = sampler([8], Condition(torch.tensor([4])))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(sampler([9], Condition(torch.tensor([4]))), alone, atol=1e-3)


class Linear(Denoiser):
    """v = a x + label, so that every guided step can be computed by hand."""

    null_label, label_dropout = 10, 0.1

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = a

    def forward(self, x, t, condition):
        return DenoiserOutput(self.a * x + condition.label[:, None, None, None], None)


def test_autoguidance_leads_away_from_the_weaker_denoiser_inside_the_interval():
    x, labels = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64), Condition(torch.tensor([3]))
    z = sample_ode(Linear(1.0), x, labels, steps=2, guidance=Guidance(2.0, 0.6, 1.0), guide=Linear(0.5))
    first = 2.0 - 0.5 * ((0.5 * 2 + 3) + 2 * (1.0 * 2 - 0.5 * 2))  # guided at t = 1
    second = first - 0.5 * (first + 3)  # not at t = 0.5
    assert z.item() == pytest.approx(second, abs=1e-12)
    # A guide equal to the denoiser has no effect, on both paths and with the SDE.
    for path in ("linear", "cosine"):
        options = {"steps": 4, "step_noise": lambda i: torch.ones_like(x), "flow": Flow(path)}
        plain = sample_sde(Linear(1.0), x, labels, **options)
        guided = sample_sde(Linear(1.0), x, labels, **options, guidance=Guidance(3.0), guide=Linear(1.0))
        torch.testing.assert_close(guided, plain, atol=1e-12, rtol=0)


def test_guidance_of_a_denoiser_that_always_sees_labels_is_refused(run):
    m = open_source(str(run), World()).parts
    m.modules.denoiser.label_dropout = 0.0
    with pytest.raises(ValueError, match="label_dropout is 0"):
        ImageSampler(SamplingPlan(guidance=Guidance(2.0)), m.recipe, m.modules, m.latent)
    ImageSampler(SamplingPlan(), m.recipe, m.modules, m.latent)


def test_uint8_is_the_nearest():
    values = torch.tensor([-1.0, -0.999, 0.0, 0.004, 0.9999, 1.0, 1.5]).view(1, 1, 1, -1)
    assert to_uint8(values).flatten().tolist() == [0, 0, 128, 128, 255, 255, 255]


def test_uint8_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(values), values.float() / 127.5 - 1)
    assert torch.equal(to_uint8(to_float(values)), values)
