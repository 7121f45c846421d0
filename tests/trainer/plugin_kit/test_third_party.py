"""A separately installed package provides a plugin that is found by name and used in training."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.files.weights import read_tree
from tests.support import ROOT, toys
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.plugin_kit.conformance import examine, resolve

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


def test_its_encoder_passes_the_conformance_kit(module_registry):
    case = resolve("plugins", f"{ROOT}/tests/third_party/color_lab/encoders.py:mean_colors", ["parts=3"])
    assert [result for result in examine(case) if result.failure] == []


def test_its_tokenizer_brings_its_own_file_format(tmp_path, capsys, module_registry):
    """`import` and `export` read and write it by the tokenizer's declaration, and `checkpoint` options take it."""
    tables = toys.TOML[: toys.TOML.index("[tokenizer]")], toys.TOML[toys.TOML.index("[denoiser]") :]
    plugin = f'plugins = ["{ROOT}/tests/third_party/color_lab/tokenizers.py"]\n'
    toml = tmp_path / "run.toml"
    toml.write_text(f'{plugin}{tables[0]}[tokenizer]\nname = "color_blocks"\n{tables[1]}')
    state = {"analysis": torch.rand(8, 48), "synthesis": torch.rand(48, 4)}
    torch.save({"palette": state, "made_by": "Color Lab", "swatches": torch.rand(3)}, tmp_path / "mine.palette")

    model = tmp_path / "model"
    assert main(["import", f"{tmp_path}/mine.palette", f"--config={toml}", f"--out={model}"]) == 0
    assert "Not imported from" in (said := capsys.readouterr().out) and "swatches" in said
    for source in ([str(model)], [str(toml), "--tokenizer.weights=mine.palette"]):
        out = tmp_path / f"out{len(source)}"
        assert main(["export", *source, "--format=palette", f"--out={out}"]) == 0
        assert f"Open {out}/0.palette with Color Lab." in capsys.readouterr().out
        back = read_tree(out / "0.palette", "x")["palette"]
        assert all(torch.equal(back[name], state[name]) for name in state)
    assert main(["export", str(model), "--format=diffusers", f"--out={tmp_path}/x"]) == 2
    said = capsys.readouterr().err
    assert "tokenizer.name = 'color_blocks'" in said and "--format=palette: the tokenizer, as a palette" in said
    assert main(["export", str(toml), "--format=palette", f"--out={tmp_path}/x"]) == 2
    assert "sets no tokenizer.weights" in capsys.readouterr().err


def test_its_tokenizer_passes_the_conformance_kit(module_registry):
    case = resolve("plugins", f"{ROOT}/tests/third_party/color_lab/tokenizers.py:color_blocks", [])
    assert [result for result in examine(case) if result.failure] == []
