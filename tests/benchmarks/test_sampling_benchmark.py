"""benchmarks/sampling.py: the plain sampler computes the same latents, and the program prints and writes ratios."""

import json

import pytest
import torch

from benchmarks.sampling import main, plain_euler
from benchmarks.workload import Workload
from components.diffusion.samplers import Guidance, sample_ode
from tests.support import toys
from trainer import config as configs


@pytest.fixture
def toml(tmp_path) -> str:
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return str(path)


def test_both_samplers_compute_the_same(toml):
    work = Workload(configs.load(toml, ["--training.precision=fp64"]), torch.device("cpu"), compile=False)
    m = work.parts.modules
    for p in m.denoiser.parameters():  # its last layer begins at zero
        torch.nn.init.normal_(p, std=0.05)
    m.denoiser.double().eval()
    m.heads.double()
    condition, noise = work.parts.sampling_condition(torch.arange(3)), torch.randn(3, *work.parts.latent).double()
    plain = plain_euler(m, noise, condition, 4, 2.0)
    ours = sample_ode(m.denoiser, noise, condition, steps=4, guidance=Guidance(2.0))
    assert (plain - noise).norm() > 0.01
    torch.testing.assert_close(plain, ours, rtol=1e-12, atol=1e-12)


def test_prints_and_writes_ratios(toml, tmp_path, capsys):
    out = tmp_path / "sampling.json"
    assert main([toml, "--batch=2", "--steps=2", "--rounds=2", f"--json={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["plain, fp32"]["ratios"] == [1.0, 1.0]
    assert all(len(found[name]["ratios"]) == 2 for name in ("ours, fp32", "ours, bf16"))
    assert capsys.readouterr().out.count("images/s") == 3


@pytest.mark.parametrize("wrong", ["--guidance=1", "--steps=0", "--nope.key=1"])
def test_wrong_options_are_one_line(toml, capsys, wrong):
    assert main([toml, wrong]) == 2
    assert capsys.readouterr().err.startswith("error: ")
