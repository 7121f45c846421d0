"""Training times follow the distribution set in [flow], and the samplers' times are shifted the same way."""

import argparse
import math
from statistics import NormalDist

import pytest
import torch

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, Recipe
from components.diffusion.flow import Flow, dimension_shift
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.samplers import sample_ode, sample_sde
from components.registry import discover
from tests.support import toys
from trainer import config
from trainer.commands.sample import add_arguments
from trainer.run import assemble
from trainer.run.pictures import image_sampler, sampling_plan

discover("plugins")
U = torch.linspace(0.003, 0.997, 41, dtype=torch.float64)
SETTINGS = [(0.0, 1.0, 1.0), (0.7, 1.3, 1.0), (-0.4, 0.6, 6.928), (0.0, 1.0, 0.3)]


@pytest.mark.parametrize(("mean", "std", "shift"), SETTINGS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_quantiles_of_lognormal_times(path, mean, std, shift):
    found = Flow(path, "lognormal", mean, std, shift).times(U)
    for u, t in zip(U.tolist(), found.tolist()):
        ratio = shift * math.exp(NormalDist(mean, std).inv_cdf(u))  # sigma / alpha
        assert t == pytest.approx(
            ratio / (1 + ratio) if path == "linear" else 2 / math.pi * math.atan(ratio), rel=1e-12
        )


@pytest.mark.parametrize(("mean", "std", "shift"), SETTINGS)
def test_density_on_the_linear_path_is_logit_normal(mean, std, shift):
    """dt / du is one over the density; the shift moves the mean of logit t by its logarithm."""
    u = U.clone().requires_grad_()
    t = Flow("linear", "lognormal", mean, std, shift).times(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    for x, found in zip(t.tolist(), slope.tolist()):
        z = (math.log(x / (1 - x)) - mean - math.log(shift)) / std
        assert 1 / found == pytest.approx(math.exp(-z * z / 2) / (math.sqrt(2 * math.pi) * std * x * (1 - x)), rel=1e-9)


@pytest.mark.parametrize("shift", [0.3, math.sqrt(2), 6.928])
def test_uniform_times_shifted(shift):
    """P(t' <= x) is the t that the shift maps to x."""
    for x in (0.01, 0.3, 0.5, 0.99):
        before = x / (shift - (shift - 1) * x)
        found = Flow(shift=shift).times(torch.tensor([before], dtype=torch.float64)).item()
        assert found == pytest.approx(x, rel=1e-12)
    for path in ("linear", "cosine"):
        ends = Flow(path, shift=shift).shifted(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert ends.tolist() == pytest.approx([0.0, 1.0], abs=1e-15)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_shift_multiplies_the_noise_over_the_signal(path):
    flow = Flow(path, shift=3.0)
    before, after = flow.coefficients(U), flow.coefficients(flow.shifted(U))
    torch.testing.assert_close(after.sigma / after.alpha, 3 * before.sigma / before.alpha, rtol=1e-11, atol=0)


def test_without_a_shift_nothing_changes():
    t = torch.rand(100)
    assert torch.equal(Flow().times(t), t) and torch.equal(Flow().shifted(t), t)
    assert torch.equal(Flow("linear", "lognormal").times(t), Flow("linear", "lognormal", shift=1.0).times(t))


def test_shift_by_dimensions():
    assert dimension_shift(LatentShape(4, 32, 32)) == 1
    assert dimension_shift(LatentShape(32, 16, 16)) == pytest.approx(math.sqrt(2))
    assert dimension_shift(LatentShape(768, 16, 16)) == pytest.approx(math.sqrt(48))


class Spy(Denoiser):
    """A velocity that does not depend on x; records the times at which it is evaluated."""

    null_label, label_dropout = 10, 0.1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.asked: list[float] = []

    def forward(self, x, t, condition):
        self.asked.append(t[0].item())
        return DenoiserOutput(torch.ones_like(x), x)


def expected(times: list[float], shift: float) -> list[float]:
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def test_the_integrators_follow_the_shifted_times():
    x, labels = torch.zeros(1, 2, 2, 2, dtype=torch.float64), Condition(torch.tensor([3]))
    flow = Flow(shift=2.5)
    spy = Spy()
    z = sample_ode(spy, x, labels, steps=4, flow=flow)
    assert spy.asked == pytest.approx(expected([1, 0.75, 0.5, 0.25], 2.5))
    torch.testing.assert_close(z, x - 1)  # from 1 to 0, whatever the steps between
    spy = Spy()
    sample_ode(spy, x, labels, steps=3, heun=True, flow=flow)
    assert spy.asked == pytest.approx(expected([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3], 2.5))
    spy = Spy()
    sample_sde(spy, x, labels, steps=4, step_noise=lambda i: torch.zeros_like(x), flow=flow)
    assert spy.asked == pytest.approx(expected([1, 0.68, 0.36, 0.04], 2.5))


@pytest.mark.parametrize(("plan", "shift"), [(0.0, 2.0), (3.0, 3.0), (1.0, 1.0)])
def test_sampling_takes_the_flows_shift_unless_it_has_its_own(plan, shift):
    m, spy = toys.modules(), Spy()
    m.denoiser, m.flow = spy, Flow(shift=2.0)
    sampler = ImageSampler(SamplingPlan(steps=2, shift=plan), Recipe(), m, toys.LATENT)
    sampler([0], Condition(torch.tensor([1])))
    assert spy.asked == pytest.approx(expected([1, 0.5], shift))


def parts(tmp_path, *options: str):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    loaded = config.load(str(tmp_path / "toy.toml"), list(options))
    return loaded, assemble.check(loaded, 1)


def test_the_config_reaches_the_flow_and_the_sampler(tmp_path):
    _, plain = parts(tmp_path)
    assert plain.modules.flow == Flow()
    options = ("--flow.time=lognormal", "--flow.time_mean=0.5", "--flow.time_std=1.5", "--flow.shift=auto")
    loaded, found = parts(tmp_path, *options)
    assert found.modules.flow == Flow("linear", "lognormal", 0.5, 1.5, 0.25)  # of 4 x 8 x 8 = 256 dimensions
    assert image_sampler(loaded, found, None).flow.shift == 0.25
    loaded, found = parts(tmp_path, "--flow.shift=2", "--sampling.shift=3.5")
    assert found.modules.flow.shift == 2 and image_sampler(loaded, found, None).flow.shift == 3.5


def test_the_sample_command_may_set_another_shift(tmp_path):
    loaded, _ = parts(tmp_path, "--flow.shift=2", "--sampling.shift=3.5")
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def shift(*words: str) -> float:
        return sampling_plan(loaded, 0, vars(parser.parse_args(["run", *words]))).shift

    assert shift() == 3.5 and shift("--shift=1") == 1.0
    with pytest.raises(config.ConfigError, match="--shift"):
        shift("--shift=-2")


@pytest.mark.parametrize(
    ("option", "words"),
    [("--flow.shift=0", "flow.shift"), ("--flow.shift=dimensions", "auto"), ("--flow.time_std=0", "flow.time_std"),
     ("--sampling.shift=-1", "sampling.shift")],
)  # fmt: skip
def test_bad_values_are_named(tmp_path, option, words):
    with pytest.raises(config.ConfigError, match=words):
        parts(tmp_path, option)
