"""What a denoiser predicts: data and noise become the velocity of the linear path, in every denoiser."""

import pytest
import torch

from components.contracts import Condition, LatentShape
from components.diffusion.flow import Flow
from components.diffusion.samplers import SAMPLERS, Guidance, GuidedVelocity
from components.nn.transformer import to_velocity
from components.registry import discover
from plugins.denoisers.ditdh import DiTDH
from plugins.denoisers.jit import JiT
from plugins.denoisers.lightningdit import LightningDiT
from plugins.denoisers.meanflow_sit import MeanFlowSiT
from plugins.denoisers.sit import SiT
from plugins.recipes.meanflow import derivative
from plugins.recipes.repa import Repa
from plugins.recipes.repae import RepaE
from tests.support import toys
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble

discover("plugins")
LATENT, CLASSES, PATCH = LatentShape(3, 6, 6), 5, 2
SMALL = {"width": 24, "depth": 2, "heads": 2, "align_depth": 1, "patch_size": PATCH}
MAKERS = {
    "sit": SiT,
    "lightningdit": LightningDiT,
    "reversed": lambda *given, **options: LightningDiT(*given, reversed_time=True, **options),
    "ditdh": lambda *given, **options: DiTDH(*given, head_width=32, head_heads=4, **options),
    "meanflow_sit": MeanFlowSiT,
    "jit": lambda *given, **options: JiT(*given, bottleneck=8, context_tokens=3, **options),
}
PREDICTIONS = ("velocity", "data", "noise")


def make(name: str, prediction: str, **options):
    torch.manual_seed(0)
    denoiser = MAKERS[name](LATENT, CLASSES, prediction=prediction, **SMALL | options)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return denoiser.double()


def path(t: list[float], latent: tuple[int, ...] = LATENT) -> tuple[torch.Tensor, ...]:
    """Data, noise, times and x_t of the linear path."""
    g = torch.Generator().manual_seed(1)
    x, e = torch.randn(2, len(t), *latent, generator=g, dtype=torch.float64)
    times = torch.tensor(t, dtype=torch.float64)
    return x, e, times, Flow().sample(x, times, e).x_t


def patchify(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> tokens (B, N, p * p * C), row-major, channels last within a patch."""
    rows = [
        x[:, :, i : i + PATCH, j : j + PATCH].permute(0, 2, 3, 1).flatten(1)
        for i in range(0, x.shape[2], PATCH)
        for j in range(0, x.shape[3], PATCH)
    ]
    return torch.stack(rows, dim=1)


def answers(denoiser, output: torch.Tensor) -> None:
    """Make the network return ``output`` (B, C, h, w), or (C, h, w), for any input."""
    tokens = patchify(output if output.ndim == 4 else output[None])
    known = tokens.clone().requires_grad_()
    both = isinstance(denoiser, SiT)
    denoiser.final_layer.forward = lambda x, c: (known, None) if both else known


@pytest.mark.parametrize("name", MAKERS)
def test_the_true_data_and_the_true_noise_yield_the_true_velocity(name):
    for prediction, times in (("data", [0.05, 0.3, 0.8, 1.0]), ("noise", [0.0, 0.3, 0.8, 0.95])):
        x, e, t, x_t = path(times)
        denoiser = make(name, prediction)
        assert denoiser.prediction == prediction
        answers(denoiser, x if prediction == "data" else e)
        out = denoiser(x_t, t, Condition(torch.arange(4)))
        torch.testing.assert_close(out.velocity, e - x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_velocities_are_what_the_same_network_implies(name):
    """Only the conversion differs: output and tokens of the network are those that predict a velocity."""
    _, _, t, x_t = path([0.0, 0.02, 0.5, 1.0])
    labels = Condition(torch.tensor([0, 3, 4, 5]))
    raw, data, noise = (make(name, prediction)(x_t, t, labels) for prediction in PREDICTIONS)
    output = -raw.velocity if name == "reversed" else raw.velocity
    low, high = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1)
                 for v in ([0.05, 0.05, 0.5, 1.0], [1.0, 0.98, 0.5, 0.05]))  # fmt: skip
    torch.testing.assert_close(data.velocity, (x_t - output) / low, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noise.velocity, (output - x_t) / high, rtol=1e-12, atol=1e-12)
    assert torch.equal(data.tokens, raw.tokens) and torch.equal(noise.tokens, raw.tokens)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_are_finite_at_both_ends(name, prediction):
    _, _, t, x_t = path([0.0, 1.0])
    denoiser = make(name, prediction)
    denoiser(x_t.requires_grad_(), t, Condition(torch.tensor([0, 5]))).velocity.square().mean().backward()
    grads = [x_t.grad, *(p.grad for key, p in denoiser.named_parameters() if p.grad is not None)]
    assert len(grads) > 20 and all(g.isfinite().all() for g in grads) and x_t.grad.any()


def test_conversion_is_in_fp32_and_leaves_velocities_alone():
    x, _, t, x_t = (part.float() for part in path([0.01, 0.9]))
    assert to_velocity(x, x_t, t, "velocity") is x
    for prediction in ("data", "noise"):
        found = to_velocity(x.bfloat16(), x_t.bfloat16(), t, prediction)
        exact = to_velocity(x.bfloat16().double(), x_t.bfloat16().double(), t.double(), prediction)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_class_token_is_predicted_like_the_latent():
    x, e, t, x_t = path([0.1, 0.6])
    (c, n, _, c_t), labels = path([0.1, 0.6], (7,)), Condition(torch.tensor([1, 2]))
    for prediction, truth, token in (("data", x, c), ("noise", e, n)):
        denoiser = make("sit", prediction, class_token_dim=7)
        denoiser.final_layer.forward = lambda *_, truth=truth, token=token: (patchify(truth), token)
        out = denoiser(x_t, t, labels, class_token=c_t)
        torch.testing.assert_close(out.velocity, e - x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.others["class_token"], n - c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samplers_arrive_at_the_predicted_data(method, scale):
    """A network that always predicts one image: every sample is that image, with guidance, too."""
    image, denoiser = path([0.5])[0][0], make("jit", "data")
    answers(denoiser, image)
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(3, *LATENT, generator=g, dtype=torch.float64)
    found = SAMPLERS[method](denoiser, noise, Condition(torch.arange(3)), steps=8, guidance=Guidance(scale))
    torch.testing.assert_close(found, image.expand(3, *LATENT), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_guidance_of_velocities_is_that_of_predictions(prediction):
    _, _, _, x_t = path([0.4, 0.4])
    t, labels = torch.full((2,), 0.4, dtype=torch.float64), Condition(torch.tensor([1, 2]))
    denoiser, raw = make("lightningdit", prediction), make("lightningdit", "velocity")
    good, bad = (raw(x_t, t, c).velocity for c in (labels, raw.null_condition(labels)))
    guided = bad + 2.5 * (good - bad)
    expected = (x_t - guided) / 0.4 if prediction == "data" else (guided - x_t) / 0.6
    found = GuidedVelocity(denoiser, labels, Guidance(2.5), torch.float64)(x_t, 0.4)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recipe", [Repa, RepaE])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_recipes_with_alignment_train_it(recipe, prediction):
    """A step's velocity loss is that of the same network's output, converted by hand; alignment does not change."""
    batch, numbers = toys.batch()
    plain, converted = (_terms(recipe, kind, batch, numbers) for kind in ("velocity", prediction))
    t, noise, output = numbers["time"].view(-1, 1, 1, 1), numbers["noise"], plain["output"]
    x_t = (plain["target"] - noise) * -(1 - t) + t * noise  # the data is noise - target
    by_hand = (x_t - output) / t.clamp_min(0.05) if prediction == "data" else (output - x_t) / (1 - t).clamp_min(0.05)
    assert converted["velocity"] == pytest.approx((by_hand - plain["target"]).square().mean().item(), rel=1e-9)
    assert converted["align"] == plain["align"] and converted["trained"] == plain["trained"] > 30


def _terms(recipe, prediction: str, batch, numbers) -> dict:
    """Terms of the denoiser's group in one step, its output and target, and the number of weights with a gradient."""
    m, found = toys.modules(), {}
    m.denoiser.prediction = prediction

    def update(group, terms, **logged):
        named = {f"{part}.{key}": p for part in recipe.trains[group] for key, p in m.named()[part].named_parameters()}
        total = sum(term.weight * term.value for term in terms.values())
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
        if group == "denoiser":
            found.update({name: term.value.item() for name, term in terms.items()})
            found["trained"] = sum(g is not None and bool(g.any()) for g in grads)

    def record(module, inputs, out):
        x_t, t = inputs[0], numbers["time"].view(-1, 1, 1, 1)
        found["output"] = out.velocity.detach()
        found["target"] = (numbers["noise"] - x_t.detach()) / (1 - t)

    m.denoiser.register_forward_hook(record)
    recipe().step(m, batch, numbers, update, 0)
    return found


def test_derivative_passes_through_the_conversion():
    """MeanFlow's derivative with data prediction, against central differences."""
    x, e, t, x_t = path([0.3, 0.8])
    denoiser, labels = make("meanflow_sit", "data"), Condition(torch.tensor([1, 2]))
    interval, step = torch.tensor([0.1, 0.5], dtype=torch.float64), 1e-5
    found = derivative(denoiser, x_t, e - x, t, labels, interval)
    with torch.no_grad():
        after, before = (
            denoiser(x_t + s * (e - x), t + s, labels, interval=interval + s).velocity for s in (step, -step)
        )
    torch.testing.assert_close(found, (after - before) / (2 * step), rtol=1e-5, atol=1e-5)


def test_another_path_is_refused_by_both_keys(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    for prediction in ("data", "noise"):
        words = [f"--denoiser.prediction={prediction}", "--flow.path=cosine"]
        with pytest.raises(ConfigError, match=r"denoiser\.prediction = .*flow\.path = 'cosine'; set flow"):
            assemble.check(config.load(str(tmp_path / "toy.toml"), words), 1)
    assemble.check(config.load(str(tmp_path / "toy.toml"), ["--flow.path=cosine"]), 1)
    with pytest.raises(ConfigError, match="prediction"):
        config.load(str(tmp_path / "toy.toml"), ["--denoiser.prediction=x"])
