"""The command line itself: --version, and what is shown where the command is missing or wrong."""

import importlib.metadata
import subprocess
import sys

import pytest

from components import version as versions
from components.version import version
from tests.support import ROOT
from trainer.__main__ import COMMANDS, main


@pytest.mark.parametrize("text", [None, '[project]\nname = "other"\nversion = "9"\n', "[tool.ruff]\n", "not TOML"])
def test_an_installed_package_states_its_metadata(tmp_path, monkeypatch, text):
    assert f'\nversion = "{version()}"\n' in (ROOT / "pyproject.toml").read_text()
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(versions, "PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1.2.3 of {name}")
    assert version.__wrapped__() == "1.2.3 of titanrepa"


@pytest.mark.parametrize("name", ["titanrepa", "trainer/__main__.py"])
def test_the_command_states_versions_without_importing_torch(name):
    code = (
        f"import sys; sys.argv[0] = '/bin/{name}'\nfrom trainer.__main__ import main\n"
        "try: main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"titanrepa {version()}, torch {importlib.metadata.version('torch')}\n"


@pytest.mark.parametrize(
    ("program", "name"), [("/bin/titanrepa", "titanrepa"), ("/x/__main__.py", "python -m trainer")]
)
def test_without_a_command_the_commands_are_listed_under_the_name_called(monkeypatch, capsys, program, name):
    monkeypatch.setattr(sys, "argv", [program])
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"usage: {name} [-h] [--version] COMMAND")
    assert all(f"\n    {command}" in err for command in COMMANDS)
    for words in (["--profile"], ["trainig"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        err = capsys.readouterr().err
        assert words[0] in err and f"{name}: error:" in err
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} check")
