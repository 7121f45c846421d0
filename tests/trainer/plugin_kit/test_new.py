"""python -m trainer new: its files work unchanged, and none of the user's files is overwritten."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from trainer.__main__ import main
from trainer.commands.new import KINDS
from trainer.plugin_kit.templates import render

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A user's folder with a plugin of every kind."""
    folder = tmp_path_factory.mktemp("lab") / "plugins of mine"
    for kind in KINDS:
        assert main(["new", kind, f"my_{kind}", "--folder", str(folder)]) == 0
    return folder


def test_every_plugin_passes_its_own_tests_and_trains(lab):
    """Each test runs the conformance kit and two training steps, in one process for all."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", str(lab)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=lab, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    for kind in KINDS:
        for test in ("test_trains", "test_behavior", "test_conforms[refuses_bad_options]"):
            assert f"PASSED test_my_{kind}.py::{test}" in done.stdout


def test_the_next_commands_are_said_and_name_the_files(tmp_path, capsys):
    assert main(["new", "reconstruction_loss", "my_loss", "--folder", str(tmp_path / "new folder")]) == 0
    said = capsys.readouterr().out
    plugin = f"'{tmp_path}/new folder/my_loss.py'"
    assert f"python -m trainer conform {plugin}:my_loss\n" in said
    assert "-m pytest" in said and "-m trainer train" in said
    assert sorted(p.name for p in (tmp_path / "new folder").iterdir()) == [
        "my_loss.py",
        "my_loss.toml",
        "test_my_loss.py",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_new_plugins_follow_the_style(kind, tmp_path):
    """Formatted and linted like the rest; they import only components, except for the test, which trains."""
    for file, text in (texts := render(kind, "some_name")).items():
        (tmp_path / file).write_text(text)
        assert "template" not in text.lower()
    plugin = texts["some_name.py"]
    assert "import trainer" not in plugin and "from trainer" not in plugin
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [*ruff, *command, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_template_is_a_kind_and_the_config_is_the_plugins_own(tmp_path):
    modules = {path.stem for path in (ROOT / "trainer" / "plugin_kit" / "templates").glob("*.py")}
    assert modules - {"__init__", "tests"} == set(KINDS)
    for kind in KINDS:
        run = tomllib.loads(render(kind, "my_part")["my_part.toml"])
        table = run["encoders" if kind == "encoder" else "losses" if "loss" in kind else kind]
        assert "my_part" in table or table["name"] == "my_part"


def test_nothing_is_overwritten(tmp_path, capsys):
    mine = tmp_path / "test_my_loss.py"
    mine.write_text("mine")
    assert main(["new", "reconstruction_loss", "my_loss", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(mine) in error and "nothing was written" in error
    assert [p.name for p in tmp_path.iterdir()] == [mine.name] and mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("MyLoss", "expected a lower-case letter"),
        ("my-loss", "expected a lower-case letter"),
        ("2loss", "expected a lower-case letter"),
        ("../loss", "expected a lower-case letter"),
        ("", "expected a lower-case letter"),
        ("lambda", "no Python keyword"),
        ("random", "'random' is a Python module, which random.py would shadow"),
        ("torch", "'torch' is a Python module, which torch.py would shadow"),
        ("l1", "the name 'l1' is taken by the loss in"),
    ],
)
def test_invalid_names_are_refused_with_the_reason(tmp_path, capsys, name, says):
    assert main(["new", "reconstruction_loss", name, "--folder", str(tmp_path / "new")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_is_explained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["new", "reconstruction_loss", "my_loss", "--folder", str(tmp_path / "file" / "x")]) == 2
    assert re.search(r"--folder: '.*x' cannot be written to", capsys.readouterr().err)
