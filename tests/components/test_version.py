"""The version that a run, a checkpoint, an export and a folder of samples state."""

import importlib.metadata
import json

import pytest
import torch
from safetensors import safe_open

from components.distributed.parallel import World
from components.files.diffusers_folder import write_folder
from components.files.model_file import save_tensors
from components.version import version
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.models.sample_folder import SampleFolder
from trainer.run.loop import Trainer


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


@pytest.fixture
def another(monkeypatch):
    """Call it: from then on the code is of that version."""
    return lambda to: [
        monkeypatch.setattr(f"{m}.version", lambda: to) for m in ("trainer.run.loop", "trainer.models.sample_folder")
    ]


def test_a_run_logs_it_first_and_every_checkpoint_holds_it(toml, tmp_path, another):
    folder = tmp_path / "run"
    options = [f"--run.dir={folder}", "--recipe.name=ldm", "--sampling.every=0"]
    assert main(["train", toml, *options, "--training.steps=1"]) == 0
    first = (folder / "log.txt").read_text().splitlines()[0]
    assert first.endswith(f"titanrepa {version()}, torch {importlib.metadata.version('torch')}")

    def resumed() -> tuple[Trainer, str]:
        trainer = Trainer(config.load(toml, [*options, "--training.steps=1"]), World())
        lines: list[str] = []
        trainer._log = lines.append
        assert trainer.resume() and trainer.step == 1
        return trainer, "\n".join(lines)

    trainer, log = resumed()
    assert trainer.checkpoints.manager.read(1, ["version"]) == {"version": version()}
    assert "resumed from" in log and "titanrepa" not in log.replace(str(folder), "")
    another("99.0")
    assert f"changed since that checkpoint: titanrepa {version()} -> 99.0" in resumed()[1]

    # Those of releases that recorded none.
    trainer.checkpoints.manager.save(1, {key: value for key, value in trainer.state().items() if key != "version"})
    assert "titanrepa" not in resumed()[1].replace(str(folder), "")


def test_exports_state_it(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {"format": "pt"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "titanrepa_version": version()}
    write_folder(tmp_path / "vae", {}, {"_class_name": "AutoencoderKL"})
    stated = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert stated == {"_class_name": "AutoencoderKL", "_titanrepa_version": version()}


def test_a_folder_of_samples_states_it_and_another_version_may_add_to_it(tmp_path, another):
    folder = SampleFolder(tmp_path / "images")
    folder.begin({"seed": 1})
    assert folder.settings() == {"seed": 1, "titanrepa_version": version()}
    another("99.0")
    folder.begin({"seed": 1})
    assert folder.settings()["titanrepa_version"] == "99.0"
