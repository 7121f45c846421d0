"""MeanFlow (arXiv 2505.13447): derivative, loss, guided target and sampler by hand, and training runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from components import registry
from components.contracts import Batch, Condition, Denoiser, DenoiserOutput, LatentShape, Modules, Posterior
from components.diffusion.flow import Flow
from components.diffusion.losses import velocity_mse
from components.diffusion.samplers import Guidance, sample_ode
from components.distributed.materialize import materialize
from components.distributed.parallel import Sharding, World, make_mesh, shard
from plugins.denoisers.meanflow_sit import MeanFlowSiT
from plugins.recipes.meanflow import MeanFlow, derivative, sample_meanflow
from tests.support import toys
from tests.support.compiled import assert_learns_alike, learn
from tests.support.ranks import run_ranks
from tests.support.runs import finished, largest_difference
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

torch.set_num_threads(1)
registry.discover("plugins")
LATENT = LatentShape(4, 8, 8)


def network(dtype: torch.dtype = torch.float64) -> MeanFlowSiT:
    torch.manual_seed(0)
    net = MeanFlowSiT(LATENT, 10, width=32, depth=2, heads=2, align_depth=1).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)  # also of the zero-initialized layers
    return net


def inputs(count: int = 3, dtype: torch.dtype = torch.float64) -> list:
    torch.manual_seed(1)
    t = torch.rand(count, dtype=dtype) * 0.8 + 0.1
    x, v = torch.randn(2, count, *LATENT, dtype=dtype)
    return [x, v, t, Condition(torch.arange(count)), t * torch.rand(count, dtype=dtype)]


class Linear(Denoiser):
    """u = a x + b t + c interval + d label, whose derivative along the path is a v + b + c."""

    grid = width = align_depth = 1
    label_dropout = 0.1
    null_label = 10
    keep_fp32 = True
    a, b, c, d = 0.7, -0.4, 0.9, 0.05

    def forward(self, x_t, t, condition, interval=None):
        interval = torch.zeros_like(t) if interval is None else interval
        u = self.a * x_t + (self.b * t + self.c * interval + self.d * condition.label).view(-1, 1, 1, 1)
        return DenoiserOutput(u, u)


def step(recipe: MeanFlow, **numbers: list[float]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """One step with :class:`Linear`, two images and the given uniform numbers; returns latents, noise and values."""
    torch.manual_seed(2)
    z, noise = torch.randn(2, 2, *LATENT, dtype=torch.float64)
    m = Modules(denoiser=Linear(), latent_norm=nn.Identity(), flow=Flow())
    given = {"time": [0.3, 0.6], "other_time": [0.8, 0.1], "interval": [0.2, 0.3], "label": [1.0, 1.0]} | numbers
    random = {"posterior": torch.zeros_like(z), "noise": noise}
    random |= {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    batch = Batch(None, Condition(torch.tensor([3, 5])), Posterior(z, torch.full_like(z, -30.0)))
    found = {}

    def update(group, terms, **logged):
        found.update({name: weight * value for name, (weight, value) in terms.items()} | logged)

    recipe.step(m, batch, random, update, 0)
    return z, noise, found


def test_derivative_equals_finite_differences():
    net, (x, v, t, condition, interval) = network(), inputs()

    def u(dt: float) -> torch.Tensor:
        return net(x + dt * v, t + dt, condition, interval=interval + dt).velocity

    with torch.no_grad():
        by_differences = (u(1e-5) - u(-1e-5)) / 2e-5
    found = derivative(net, x, v, t, condition, interval)
    assert not found.requires_grad and found.abs().max() > 0.1
    torch.testing.assert_close(found, by_differences, rtol=1e-7, atol=1e-8)


def test_derivative_ignores_autocast():
    net, (x, v, t, condition, interval) = network(torch.float32), inputs(dtype=torch.float32)
    expected = derivative(net, x, v, t, condition, interval)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(derivative(net, x, v, t, condition, interval), expected)


def test_no_interval_is_an_interval_of_zero():
    net, (x, _, t, condition, interval) = network(), inputs()
    out, zero = net(x, t, condition), net(x, t, condition, interval=torch.zeros_like(t))
    assert torch.equal(out.velocity, zero.velocity) and torch.equal(net.tokens(x, t, condition), out.tokens)
    longer = net(x, t, condition, interval=interval)
    assert not torch.allclose(longer.velocity, out.velocity)
    assert torch.equal(net.tokens(x, t, condition, interval=interval), longer.tokens)


def test_every_weight_is_initialized_from_the_meta_device():
    with torch.device("meta"):
        net = MeanFlowSiT(LATENT, 10, width=32, depth=2, heads=2, align_depth=1)
    materialize(net, torch.device("cpu"))
    for p in net.interval_embedder.parameters():
        assert p.isfinite().all() and (p.any() == (p.ndim == 2)) and p.abs().max() < 0.2
    out = net(torch.randn(2, *LATENT), torch.rand(2), Condition(torch.tensor([0, 10])), interval=torch.rand(2))
    assert not out.velocity.any(), "zero output layer"


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_loss_by_hand(power):
    """The first image has r = 0.3 and t = 0.8; the second, whose number exceeds the ratio, r = t = 0.6."""
    z, noise, found = step(MeanFlow(power=power))
    expected, error = 0.0, 0.0
    for i, (t, r, label) in enumerate(((0.8, 0.3, 3), (0.6, 0.6, 5))):
        x, v = (1 - t) * z[i] + t * noise[i], noise[i] - z[i]
        u = Linear.a * x + Linear.b * t + Linear.c * (t - r) + Linear.d * label
        target = v - (t - r) * (Linear.a * v + Linear.b + Linear.c)
        square = (u - target).square().sum()
        expected += square / (square + 1e-3) ** power / 2
        error += square / (2 * z[i].numel())
    torch.testing.assert_close(found["average_velocity"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["squared_error"], error, rtol=1e-6, atol=0)


def test_without_intervals_the_loss_is_flow_matching():
    z, noise, found = step(MeanFlow(interval_ratio=0.0, power=0.0))
    t = torch.tensor([0.8, 0.6], dtype=torch.float64)
    z = Posterior(z, torch.full_like(z, -30.0)).sample(torch.zeros_like(z))
    path = Flow().sample(z, t, noise)
    expected = velocity_mse(Linear()(path.x_t, t, Condition(torch.tensor([3, 5]))).velocity, path.velocity)
    assert torch.equal(found["squared_error"], expected)
    torch.testing.assert_close(found["average_velocity"], expected * z[0].numel())


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_gradients_flow_through_the_prediction_alone(power):
    """The target and the adaptive weights are constants."""
    m = toys.modules()
    m.denoiser = network()
    (batch, random), found = toys.batch(), {}
    random |= {"other_time": random["time"] * 0.5, "interval": torch.zeros_like(random["time"])}
    recipe = MeanFlow(power=power)
    recipe.step(m, batch, random, lambda group, terms, **logged: found.update(terms), 0)
    weight = m.denoiser.final_layer.linear.weight
    (ours,) = torch.autograd.grad(found["average_velocity"].value, weight)

    with torch.no_grad():
        x_0 = m.latent_norm(m.tokenizer.encode(batch.images).sample(random["posterior"]))
    t, interval = random["time"], random["time"] - random["other_time"]
    path = m.flow.sample(x_0, t, random["noise"])
    dropped = torch.where(random["label"] < 0.1, 10, batch.condition.label)
    du = derivative(m.denoiser, path.x_t, path.velocity, t, Condition(dropped), interval)
    target = path.velocity - interval.view(-1, 1, 1, 1) * du
    u = m.denoiser(path.x_t, t, Condition(dropped), interval=interval).velocity
    error = (u - target).square().flatten(1).sum(1)
    constant = torch.tensor([1 / (e + 1e-3) ** power for e in error.tolist()], dtype=error.dtype)
    (theirs,) = torch.autograd.grad((constant * error).mean(), weight)
    torch.testing.assert_close(ours, theirs)


def test_guided_target_by_hand():
    """An image is not guided if its label is dropped or its time lies above the limit."""
    recipe = MeanFlow(omega=0.6, kappa=0.3, power=0.0)
    for label, high in (([1.0, 0.05], 0.9), ([1.0, 1.0], 0.7)):
        recipe.guidance_high = high
        z, noise, found = step(recipe, label=label)
        expected = 0.0
        for i, (t, r, y, guided) in enumerate(((0.8, 0.3, 3, high > 0.8), (0.6, 0.6, 5, label[1] > 0.1))):
            x, v = (1 - t) * z[i] + t * noise[i], noise[i] - z[i]
            y = y if label[i] > 0.1 else 10
            instantaneous = Linear.a * x + Linear.b * t
            if guided:
                v = 0.6 * v + 0.3 * (instantaneous + Linear.d * y) + 0.1 * (instantaneous + Linear.d * 10)
            u = instantaneous + Linear.c * (t - r) + Linear.d * y
            expected += (u - v + (t - r) * (Linear.a * v + Linear.b + Linear.c)).square().sum() / 2
        torch.testing.assert_close(found["average_velocity"], expected, rtol=1e-6, atol=0)


def test_sampler_by_hand():
    noise = torch.randn(2, *LATENT, dtype=torch.float64)
    condition, labels = Condition(torch.tensor([3, 5])), torch.tensor([3.0, 5.0]).double().view(-1, 1, 1, 1)

    def u(x, t, r, labels=labels):
        return Linear.a * x + Linear.b * t + Linear.c * (t - r) + Linear.d * labels

    torch.testing.assert_close(sample_meanflow(Linear(), noise, condition, steps=1), noise - u(noise, 1, 0))
    half = noise - 0.5 * u(noise, 1, 0.5)
    torch.testing.assert_close(sample_meanflow(Linear(), noise, condition, steps=2), half - 0.5 * u(half, 0.5, 0))
    shifted = Flow(shift=3.0)  # t = 0.5 becomes 0.75
    first = noise - 0.25 * u(noise, 1, 0.75)
    torch.testing.assert_close(
        sample_meanflow(Linear(), noise, condition, steps=2, flow=shifted), first - 0.75 * u(first, 0.75, 0)
    )
    guided = sample_meanflow(Linear(), noise, condition, steps=1, guidance=Guidance(2.0))
    good, bad = u(noise, 1, 0), u(noise, 1, 0, torch.tensor(10.0))
    torch.testing.assert_close(guided, noise - (bad + 2 * (good - bad)))
    # Euler uses the same network without an interval.
    euler = sample_ode(Linear(), noise, condition, steps=1)
    torch.testing.assert_close(euler, noise - u(noise, 1, 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--denoiser.name=sit"], ["meanflow_sit", "interval"]),
        (["--denoiser.label_dropout=0", "--recipe.omega=2"], ["denoiser.label_dropout = 0", "recipe.omega = 2"]),
        (["--recipe.interval_ratio=2"], ["recipe.interval_ratio = 2", "[0, 1]"]),
        (["--recipe.kappa=1"], ["recipe.kappa = 1", "[0, 1)"]),
        (["--sampling.method=meanflwo"], ["did you mean 'meanflow'"]),
    ],
    ids=["denoiser", "null label", "ratio", "kappa", "sampler"],
)
def test_what_cannot_work_is_refused_before_the_run(toml, options, said):
    with pytest.raises(ConfigError) as refusal:
        assemble.check(config.load(toml, [*MEANFLOW, *options]), 1)
    assert all(text in str(refusal.value) for text in said), refusal.value


# -- runs --------------------------------------------------------------------------------------------------------

MEANFLOW = ["--recipe.name=meanflow", "--denoiser.name=meanflow_sit"]
GUIDED = ["--recipe.omega=0.8", "--recipe.kappa=0.5", "--recipe.interval_ratio=0.5"]


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("meanflow")
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, folder / "statistics.pt")
    (folder / "toy.toml").write_text(toys.TOML.replace("images = 16", f"statistics = '{folder / 'statistics.pt'}'"))
    return str(folder / "toy.toml")


def trained(rank: int, world: int, toml: str, options: list[str]) -> dict:
    registry.discover("plugins")
    options = ["--training.precision=fp64", "--training.steps=2", "--run.async_checkpoints=false", *MEANFLOW, *options]
    return finished(
        Trainer(config.load(toml, [f"--run.dir={Path(toml).parent}/{world}", *options]), World(rank, world))
    )


@pytest.mark.long
def test_trains_and_is_the_same_on_two_ranks(toml):
    one = trained(0, 1, toml, [*GUIDED, "--sampling.every=2", "--sampling.method=meanflow"])
    assert one["weights"]["denoiser.interval_embedder.mlp.0.weight"].any()
    assert {"denoiser/average_velocity", "denoiser/squared_error"} <= one["steps"][0].keys()
    for found in run_ranks(trained, 2, toml, [*GUIDED, "--parallel.shard_frozen"]):
        differences = largest_difference(one, found)
        print(differences)
        assert max(differences.values()) < 1e-8


def sharded_derivative(rank: int, world: int) -> torch.Tensor:
    net, given = network(torch.float32), inputs(dtype=torch.float32)
    shard(net, Sharding(make_mesh("cpu", (1, world)), torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        return derivative(net, *given)


@pytest.mark.long
def test_derivative_is_fp32_also_where_other_sharded_networks_are_bf16():
    expected = derivative(network(torch.float32), *inputs(dtype=torch.float32))
    for found in run_ranks(sharded_derivative, 2):
        torch.testing.assert_close(found, expected)


@pytest.mark.long
def test_resumed_equals_uninterrupted(toml, tmp_path):
    def run(*options: str) -> Trainer:
        common = [f"--run.dir={tmp_path}", "--training.steps=4", "--run.checkpoint_every=2", *MEANFLOW, *options]
        trainer = Trainer(config.load(toml, common), World())
        trainer.run()
        return trainer

    whole = run().state()["modules"]["denoiser"]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    resumed = run()
    assert resumed.step == 4
    for name, value in resumed.state()["modules"]["denoiser"].items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.long
def test_compiled_learns_like_eager(toml, tmp_path):
    small = ["--training.resolution=16", "--tokenizer.multipliers=[1,2]", f"--run.dir={tmp_path}"]
    loaded = config.load(toml, [*MEANFLOW, *GUIDED, *small])
    assert_learns_alike(learn(loaded, None), learn(loaded, "aot_eager"))
