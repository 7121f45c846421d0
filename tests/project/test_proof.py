"""train_configs/proof/run.sh trains every arm, goes on where it was stopped, and compares."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "train_configs" / "proof" / "run.sh"
SHORT = ["--training.steps=3", "--run.log_every=1", "--evaluation.every=3", "--evaluation.images=120",
         "--evaluation.reconstruction_images=120", "--evaluation.reference_images=200"]  # fmt: skip


def call(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True)


def started(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("training ")]


def test_usage_and_mistakes(tmp_path):
    assert "--quick" in call("--help").stdout
    for arguments, said in (
        (["--arms=repa,rpea"], "no arm 'rpea'; available: ldm, repa, repae"),
        (["--arms=repa_tuned"], "repa_tuned needs repae"),
        (["--seeds=0"], "expected positive numbers"),
        (["quick"], "'quick': expected --out"),
    ):
        done = call(f"--out={tmp_path}", *arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_arm_trains_and_is_compared(tmp_path):
    out = [f"--out={tmp_path}", "--quick", "--tokenizer-steps=3", *SHORT]
    done = call(*out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert len(found["arms"]) == 14 and {"ldm", "repae", "repa_tuned_lightningdit"} <= set(found["arms"])
    assert len(started(done)) == 15, started(done)
    # A run that was killed before its end goes on; the others are kept.
    (tmp_path / "repa-seed0" / "finished").unlink()
    again = call(*out)
    assert again.returncode == 0 and started(again) == ["training repa-seed0"], again.stdout + again.stderr
    table = (tmp_path / "compare" / "table.md").read_text()
    assert "fd_judge" in table and "psnr" in table
