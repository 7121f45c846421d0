"""A separately installed package provides a plugin that is found by name and used in training."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, toys
from trainer import config
from trainer.config import ConfigError

pytestmark = pytest.mark.long

TOML = toys.TOML.replace("[encoders.tiny_vit]", "[encoders.mean_colors]\nparts = 4")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package installed as by pip, built from a copy because setuptools adds its own files."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip to install a package with")
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "tests" / "third_party", folder / "source")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    run("-m", "pip", "install", *options, "--target", str(folder / "packages"), str(folder / "source"))
    return folder / "packages"


def test_an_installed_package_brings_an_encoder_that_a_run_trains_with(installed, tmp_path):
    assert (installed / "color_lab" / "encoders.py").is_file()
    (tmp_path / "run.toml").write_text(TOML)
    said = run(
        *("-m", "trainer", "train", str(tmp_path / "run.toml"), f"--run.dir={tmp_path / 'run'}", "--training.steps=2"),
        PYTHONPATH=os.pathsep.join((str(installed), str(ROOT))),
    )
    assert "Done: 2 steps" in said
    assert "mean_colors" in (tmp_path / "run" / "config.toml").read_text()


def test_without_it_the_name_is_refused(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    with pytest.raises(ConfigError, match="no encoder is called 'mean_colors'"):
        config.load(str(tmp_path / "run.toml"))


def test_its_encoder_passes_the_conformance_kit():
    from components import registry
    from trainer.plugin_kit.conformance import examine, resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.encoders, "_plugins", dict(registry.encoders._plugins))
        subject = resolve("plugins", f"{ROOT}/tests/third_party/color_lab/encoders.py:mean_colors", ["parts=3"])
        assert [result for result in examine(subject) if result.fault] == []
