"""bf16 on a CPU: autocast where it multiplies in bf16, in every command; elsewhere fp32, and the log says which.

Runs of toys that pretend the one or the other; autocast itself works on any CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from components.distributed.parallel import World
from components.nn.precision import multiplies_in_bf16
from plugins.recipes.repae import RepaE
from tests.support import toys
from trainer import config
from trainer.__main__ import main
from trainer.run import loop, pictures, prepare
from trainer.run.loop import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("capabilities, expected", [({}, False), ({"avx512_bf16": True}, False),
                                                    ({"avx512_bf16": True, "amx_bf16": True}, True)])  # fmt: skip
def test_only_amx_counts(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_in_bf16(CPU) == (expected and torch.backends.mkldnn.is_available())
    assert multiplies_in_bf16(torch.device("cuda"))


def test_pytorch_names_the_capability():
    """Where the kernel lists flags: PyTorch agrees with it."""
    info = Path("/proc/cpuinfo")
    flags = next((line.split() for line in info.read_text().splitlines() if line.startswith("flags")), None) if (
        info.exists()) else None  # fmt: skip
    if not flags:
        pytest.skip("needs the flags of an x86 CPU in /proc/cpuinfo")
    assert torch.cpu.get_capabilities().get("amx_bf16") == ("amx_bf16" in flags)


def train(folder: Path, able: bool, monkeypatch, *options: str) -> Trainer:
    """Two steps of a run in ``folder``, on a CPU that does or does not multiply in bf16."""
    monkeypatch.setattr(prepare, "multiplies_in_bf16", lambda device: able)
    toml = folder.parent / "toy.toml"
    toml.write_text(toys.TOML)
    more = ["--training.steps=2", "--sampling.every=2", "--training.precision=bf16", *options]
    trainer = Trainer(config.load(str(toml), [f"--run.dir={folder}", *more]), World())
    assert trainer.run()
    return trainer


def test_every_command_computes_in_bf16(tmp_path, monkeypatch, caplog, capsys):
    seen = {"step": [], "pictures": []}

    def watched(place, function):
        def call(*inputs, **options):
            seen[place].append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return function(*inputs, **options)

        return call

    monkeypatch.setattr(loop, "try_flops_per_image", lambda *inputs: None)  # it takes a step on the meta device
    monkeypatch.setattr(RepaE, "step", watched("step", RepaE.step))
    for name in ("sample_images", "reconstruct"):
        monkeypatch.setattr(pictures, name, watched("pictures", getattr(pictures, name)))
    with caplog.at_level("INFO", logger="titanrepa"):
        trainer = train(tmp_path / "run", True, monkeypatch)
    assert caplog.text.count('training.precision = "bf16": autocast, as this CPU multiplies in bf16') == 1
    assert seen["step"] and seen["pictures"]
    assert set(seen["step"]) == set(seen["pictures"]) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for m in trainer.parts.modules.named().values() for p in m.parameters())

    run = str(tmp_path / "run")
    for extra, precision in (([], "bf16"), (["--precision=fp32"], "fp32")):
        out = tmp_path / f"images-{precision}"
        assert main(["sample", run, "--num-samples=2", f"--out={out}", *extra]) == 0
        assert json.loads((out / "samples.json").read_text())["precision"] == precision
    assert (tmp_path / "images-bf16/000000.png").read_bytes() != (tmp_path / "images-fp32/000000.png").read_bytes()
    assert main(["encode", run, f"--out={tmp_path / 'cache'}"]) == 0
    assert json.loads((tmp_path / "cache/index.json").read_text())["precision"] == "bf16"


def test_without_the_instructions_it_is_fp32(tmp_path, monkeypatch, caplog):
    with caplog.at_level("INFO", logger="titanrepa"):
        low = train(tmp_path / "bf16", False, monkeypatch)
    assert 'training.precision = "bf16": computed in fp32, as this CPU has no fast bf16 products' in caplog.text
    exact = train(tmp_path / "fp32", False, monkeypatch, "--training.precision=fp32")
    for name, module in exact.parts.modules.named().items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, low.parts.modules.named()[name].state_dict()[key]), f"{name}.{key}"
    out = tmp_path / "images"
    assert main(["sample", str(tmp_path / "bf16"), "--num-samples=2", f"--out={out}"]) == 0
    assert json.loads((out / "samples.json").read_text())["precision"] == "fp32"
