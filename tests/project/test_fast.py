"""The fast selection: it leaves out what is marked long, and keeps tests of every part."""

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT

PARTS = (
    *(
        "architecture",
        "bad_configs",
        "batch_norm",
        "checkpoint",
        "checkpoint_folder",
        "configs",
        "data",
        "random_numbers",
    ),
    *("encoders_published", "flow", "guard", "latent_cache", "layouts", "losses", "lpips", "monitor", "precision"),
    *("published", "registry", "run", "sample", "scores", "scripts", "step", "step_oracle", "version", "weights"),
)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_keeps_tests(part):
    (path,) = (ROOT / "tests").rglob(f"test_{part}.py")
    statements = ast.parse(path.read_text()).body
    assert not any(ast.unparse(s) == "pytestmark = pytest.mark.long" for s in statements)


def test_fast_leaves_out_what_is_marked():
    files = ["tests/project/test_scripts.py", "tests/project/test_cluster_files.py"]  # which import no torch
    command = [sys.executable, "-m", "pytest", "--collect-only", "--fast", *files]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "test_scripts.py::" in said and "test_cluster_files.py::" not in said and " deselected" in said
