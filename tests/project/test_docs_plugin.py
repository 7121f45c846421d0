"""Follows docs/writing-a-plugin.md exactly: its code blocks, written to files outside the repository, work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components import registry
from components.contracts import Batch, Condition, Dataset, Encoder, ReconstructionLoss
from components.diffusion.random_numbers import draw
from components.distributed.parallel import World
from tests.support import ROOT
from trainer import config
from trainer.commands import plugins as plugins_command
from trainer.plugin_kit.conformance import examine, resolve
from trainer.run import assemble

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("module_registry")]

PAGE = ROOT / "docs" / "writing-a-plugin.md"
FILES = {"my_encoder.py", "my_run.toml", "my_loss.py", "my_dataset.py", "my_recipe.py"}

torch.set_num_threads(1)


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A folder outside the repository with the page's files: blocks that begin with a comment naming the file."""
    folder = tmp_path_factory.mktemp("my_lab")
    for _, text in blocks():
        if named := re.match(r"# (\w+\.\w+)\n", text):
            (folder / named[1]).write_text(text, encoding="utf-8")
    return folder


def test_the_page_has_its_files(lab):
    assert {path.name for path in lab.iterdir()} == FILES


def test_the_encoder_is_twenty_lines(lab):
    code = "".join((lab / "my_encoder.py").read_text().split('"""')[::2])  # without the docstring
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 20


def test_the_encoder_meets_the_contract(lab):
    registry.discover("plugins", [str(lab / "my_encoder.py")])
    encoder = registry.encoders.get("augreg").cls(32, 4, size="tiny", pretrained=False)
    encoder.load_weights()
    assert isinstance(encoder, Encoder)
    tokens = encoder(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert tokens.shape == (2, 16, encoder.embed_dim) == (2, 16, 192)
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_page_shows_what_the_command_prints(lab, monkeypatch):
    registry.discover("plugins", [str(lab / "my_encoder.py")])
    printed = plugins_command.describe(registry.encoders.get("augreg"))
    shown = next(text for language, text in blocks() if language == "text")
    assert printed.replace(str(lab), "/home/me/my_lab").strip() == shown.strip()


def test_the_toml_is_a_sound_run_with_the_encoder(lab):
    loaded = config.load(str(lab / "my_run.toml"))
    parts = assemble.check(loaded, world_size=1)
    assert type(parts.modules.encoders["augreg"]).__name__ == "AugReg"
    assert not parts.unused


def test_one_plugin_serves_under_two_labels(lab):
    text = (lab / "my_run.toml").read_text()
    two = next(text for language, text in blocks() if language == "toml" and "[encoders.narrow]" in text)
    own = '[encoders.augreg]\nsize = "tiny"\npretrained = false\n'
    assert own in text
    (lab / "two.toml").write_text(text.replace(own, two))
    parts = assemble.check(config.load(str(lab / "two.toml")), world_size=1)
    assert {label: e.embed_dim for label, e in parts.modules.encoders.items()} == {"narrow": 192, "wide": 768}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("my_encoder.py:augreg", ["pretrained=false"]),
        ("my_loss.py:spectrum", []),
        ("my_dataset.py:stripes", []),
        ("my_recipe.py:ldm_l1", []),
    ],
)
def test_every_plugin_of_the_page_passes_the_conformance_kit(lab, spec, options):
    """Except torch.compile and FSDP2 of the encoder, whose arithmetic is TimmEncoder's."""
    case = resolve("plugins", f"{lab}/{spec}", options)
    results = list(examine(case, leave_out=("compiles_in_one_graph", "shards_with_fsdp2")))
    assert [result for result in results if result.failure] == []


@pytest.mark.parametrize("recipe", ["repae", "ldm_l1"])
def test_the_other_plugins_take_a_step(lab, recipe):
    """All four of the page's plugins in one step: finite losses, and gradients where the recipe trains."""
    files = ["my_encoder.py", "my_loss.py", "my_dataset.py", "my_recipe.py"]
    overrides = [
        f"--plugins={files}",
        "--losses.spectrum.weight=0.5",
        "--dataset.name=stripes",
        f"--recipe.name={recipe}",
    ]
    loaded = config.load(str(lab / "my_run.toml"), overrides)
    parts = assemble.build(loaded, World())
    assert isinstance(parts.dataset, Dataset) and len(parts.dataset) == 1000
    samples = [parts.dataset[i] for i in range(8)]
    assert all(s.image.shape == (3, 32, 32) and s.image.dtype == torch.uint8 for s in samples)
    assert all((s.image == s.image[:, :1]).all() == (s.label == 1) for s in samples)  # vertical: equal rows
    images = torch.stack([s.image for s in samples]).float() / 127.5 - 1
    batch = Batch(images, Condition(torch.tensor([s.label for s in samples])))
    seen = {}

    def update(group, terms, **extra):
        sum(weight * value for weight, value in terms.values()).backward()
        seen[group] = terms

    parts.recipe.step(parts.modules, batch, draw(0, 0, range(8), 8, parts.random_numbers), update, 0)
    assert set(seen) == ({"tokenizer", "denoiser"} if recipe == "repae" else {"denoiser"})
    assert all(value.isfinite() for terms in seen.values() for _, value in terms.values())
    if recipe == "repae":
        assert isinstance(parts.modules.reconstruction["spectrum"], ReconstructionLoss)
        assert seen["tokenizer"]["spectrum"].weight == 0.5 and seen["tokenizer"]["spectrum"].value > 0
    else:
        assert set(seen["denoiser"]) == {"velocity_l1"}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parts.modules.denoiser.parameters())


def test_the_run_of_the_page_trains_in_the_readers_own_folder(lab, monkeypatch):
    monkeypatch.chdir(lab)
    command = [sys.executable, "-m", "trainer", "train", "my_run.toml", "--training.steps=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Done: 2 steps" in done.stdout
    assert any(path.name.startswith("samples_") for path in lab.rglob("*.png"))
