"""benchmarks/against.py takes steps of two versions in turns, and reports a run that ends by itself."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import against
from tests.support import toys

pytestmark = pytest.mark.long


def test_two_versions_in_turns(tmp_path, capsys):
    config = tmp_path / "toy.toml"
    config.write_text(toys.TOML)
    found = tmp_path / "found.json"
    counts = ["--rounds=2", "--steps=1", "--warmup=1"]
    assert against.main([str(against.ROOT), str(config), *counts, f"--json={found}"]) == 0
    measured = json.loads(found.read_text())
    for kind in ("ms per step", "CPU ms per step"):
        assert len(measured[kind]["ratios"]) == 2
        assert measured[kind]["this"] > 0 and measured[kind]["other"] > 0

    assert against.main([str(against.ROOT), str(config), *counts, "--training.batch_size=0"]) == 2
    assert "batch_size" in capsys.readouterr().err


@pytest.mark.skipif(subprocess.run(["git", "rev-parse"], cwd=against.ROOT).returncode != 0, reason="needs git")
def test_a_commit_is_checked_out_elsewhere(tmp_path):
    folder = against.checkout("HEAD", tmp_path / "checkout")
    code = "import trainer; print(trainer.__path__[0])"
    assert (folder / "trainer" / "__main__.py").exists()
    env = os.environ | {"PYTHONPATH": str(folder)}
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True).stdout
    assert printed.strip() == str(folder / "trainer")
