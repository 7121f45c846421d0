"""A dataset with captions and a denoiser that reads them, both from elsewhere, train and sample."""

import json

import numpy as np
import pytest
import torch

from components.contracts import Condition
from components.distributed.parallel import World
from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.plugin_kit.conformance import examine, resolve
from trainer.run.loop import Trainer

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("module_registry")]

PLUGINS = ROOT / "tests" / "third_party" / "caption_lab.py"
OPTIONS = [
    "--recipe.name=repa",
    f'--plugins=["{PLUGINS}"]',
    "--dataset.name=captioned_colors",
    "--training.steps=2",
    "--sampling.guidance=2.0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, with its folder."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "run.toml").write_text(
        toys.TOML.replace(
            '[denoiser]\nname = "sit"\nwidth = 32\ndepth = 2\nheads = 2\nalign_depth = 1\n',
            '[denoiser]\nname = "caption_transformer"\n',
        )
    )
    loaded = config.load(str(folder / "run.toml"), [*OPTIONS, f"--run.dir={folder / 'run'}"])
    trainer = Trainer(loaded, World())
    assert trainer.run()
    return trainer, folder


def test_it_trains_and_draws_pictures(run):
    trainer, folder = run
    assert list((folder / "run").rglob("samples_*.png"))
    words = trainer.parts.modules.denoiser.words.weight
    state = trainer.groups["denoiser"].optimizer.state[words]
    assert (state["exp_avg"].abs().sum(1) > 0).all()  # every word occurs in the captions of the two steps


def test_the_samples_follow_their_captions(run):
    """Padding has no effect, the words have, and guidance contrasts them with the empty caption."""
    trainer, _ = run
    denoiser, dataset = trainer.parts.modules.denoiser, trainer.parts.dataset
    more = dataset.sampling_conditions([0, 3])  # "red" and "dark red"
    condition = Condition(torch.zeros(2, dtype=torch.int64), more)
    assert more["text_mask"].sum(1).tolist() == [2, 3]
    x, t = torch.randn(1, *trainer.parts.latent).expand(2, -1, -1, -1), torch.full((2,), 0.5)
    red, dark = denoiser(x, t, condition).velocity
    assert not torch.equal(red, dark)
    padded = condition._replace(more=more | {"text": more["text"].where(more["text_mask"], torch.tensor(4))})
    assert torch.equal(denoiser(x, t, padded).velocity[0], red)
    null = denoiser.null_condition(condition)
    assert torch.equal(*denoiser(x, t, null).velocity) and not null.more["text"].any()
    assert null.more["text_mask"].sum(1).tolist() == [1, 1]


def test_the_run_can_be_sampled_from(run):
    """Sample i has the caption of number i, whatever the batch size."""
    _, folder = run
    options = ["--num-samples=4", "--steps=2", f"--out={folder / 'four'}"]
    assert main(["sample", str(folder / "run"), *options]) == 0
    assert main(["sample", str(folder / "run"), *options[:2], "--batch-size=1", f"--out={folder / 'one'}"]) == 0
    first, second = (np.load(next((folder / name).glob("*.npz")))["arr_0"] for name in ("four", "one"))
    assert first.shape == (4, 32, 32, 3) and np.abs(first.astype(int) - second).max() <= 1
    assert json.loads((folder / "four" / "samples.json").read_text())["num_classes"] == 1


def test_estimates_and_timing_run_without_the_dataset(run, capsys):
    _, folder = run
    toml = str(folder / "run.toml")
    assert main(["check", toml, *OPTIONS]) == 0
    assert main(["benchmark", toml, "--steps=1", "--warmup=0", "--only=eager", *OPTIONS]) == 0


@pytest.mark.parametrize("name", ["captioned_colors", "caption_transformer"])
def test_both_pass_the_conformance_kit(name):
    results = list(examine(resolve("plugins", f"{PLUGINS}:{name}")))
    assert [result for result in results if result.failure] == []
