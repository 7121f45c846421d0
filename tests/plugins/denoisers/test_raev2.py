"""DiT-DH as RAEv2 uses it: in-context conditioning, an early prediction, and internal guidance by it.

tests/data/published_raev2.npz was recorded from the published code (nanovisionx/RAEv2) in float64 at a tiny size, with
its RMS norm in float64, too, and the weights of :func:`weights`: both predictions, losses, gradient norms, samples.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from components.contracts import Condition, Denoiser, DenoiserOutput, LatentShape, LossTerm, Modules, Recipe
from components.diffusion.flow import Flow
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.losses import denoising
from components.diffusion.samplers import SAMPLERS, Guidance, sample_ode, sample_sde
from components.distributed.parallel import World
from components.files import weights_file
from components.files.adapter import take_module
from components.files.weights import WeightsError, load_strict
from components.nn.latent_norm import LatentNorm
from components.nn.lightningdit import rotate
from components.registry import discover
from plugins.denoisers.ditdh import DiTDH
from plugins.tokenizers.identity import Identity
from tests.support import DATA, toys
from tests.support.runs import finished
from trainer import config
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

discover("plugins")
RECORDED = dict(np.load(DATA / "published_raev2.npz").items())
SHAPES = {key: tuple(map(int, re.findall(r"\d+", shape))) for key, shape in (k.split(" ", 1) for k in RECORDED["keys"])}
LATENT, CLASSES = LatentShape(6, 4, 4), 5
SIZE = {"width": 16, "depth": 3, "heads": 2, "head_width": 32, "head_depth": 2, "head_heads": 2, "align_depth": 1}
RAEV2 = {"time_tokens": 2, "class_tokens": 3, "early_depth": 2, "qk_norm": True, "prediction": "data"}


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(RECORDED[name]))


def formula(index: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    n = int(np.prod(shape))
    return (torch.sin(torch.arange(n, dtype=torch.float64) * 1.7 + index * 0.9) * scale).view(shape)


def weights() -> dict[str, torch.Tensor]:
    """The recorded network's state dict, by its published names."""
    trained = sorted(key for key in SHAPES if "rope" not in key)
    state = {key: formula(i, SHAPES[key], 1.0 if "norm" in key else 0.5) for i, key in enumerate(trained)}
    return state | {key: recorded(key) for key in SHAPES if "rope" in key}


def ditdh(**options) -> DiTDH:
    return DiTDH(LATENT, CLASSES, **SIZE | RAEV2 | options).double()


def load(denoiser: DiTDH, path) -> None:
    state = take_module(denoiser, weights_file.read(path, "denoiser"), "ema", "denoiser")["denoiser"]
    load_strict(denoiser, state, "denoiser", str(path))


@pytest.fixture
def published(tmp_path) -> DiTDH:
    """The recorded network, loaded from a file with the layout of the published checkpoints."""
    denoiser = ditdh(early_weight=0.7)
    assert len(denoiser.state_dict()) == len(SHAPES)
    torch.save({"step": 7, "model": {}, "ema": weights(), "scheduler": None}, tmp_path / "checkpoint.pt")
    load(denoiser, tmp_path / "checkpoint.pt")
    return denoiser


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Condition]:
    """Data, noise, times and classes of the recording; 5 is the null label."""
    t = torch.tensor([0.06, 0.3, 0.7, 1.0], dtype=torch.float64)
    return formula(100, (4, *LATENT), 1.5), formula(200, (4, *LATENT), 1.2), t, Condition(torch.tensor([0, 2, 4, 5]))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-10


def test_both_predictions_losses_and_gradients_are_the_published_ones(published):
    x, e, t, condition = inputs()
    path = Flow().sample(x, t, e)
    out = published(path.x_t, t, condition)
    for velocity, name in ((out.velocity, "full"), (out.early, "early")):
        close(velocity, (path.x_t - recorded(name)) / t.view(-1, 1, 1, 1))
    terms = denoising(Modules(denoiser=published), path, t, condition)
    total = sum(weight * value for weight, value in terms.values())
    close(terms["early_velocity"].value, recorded("loss_early"))
    close(total, recorded("loss"))
    assert terms["early_velocity"].weight == 0.7 and list(terms) == ["velocity", "early_velocity"]
    total.backward()
    found = {key: p.grad.norm() for key, p in published.named_parameters()}
    theirs = published.adapters[0](published)._published()
    norms = dict(zip(RECORDED["grad_keys"], recorded("grad_norms")))
    assert {theirs[key] for key in found} == set(norms)
    for key, norm in found.items():
        close(norm, norms[theirs[key]])


def test_samples_with_internal_guidance_are_the_published_ones(published):
    noise, condition = formula(300, (2, *LATENT), 1.0), Condition(torch.tensor([1, 3]))
    for name, guidance in (
        ("plain", Guidance(kind="internal")),
        ("all", Guidance(1.78, kind="internal")),
        ("interval", Guidance(2.5, 0.3, 0.85, "internal")),
    ):
        close(sample_ode(published, noise, condition, steps=6, flow=Flow(shift=1.5), guidance=guidance),
              recorded(f"sample_{name}"))  # fmt: skip


def test_a_file_of_the_published_layout_names_its_classes_and_its_missing_keys(published, tmp_path):
    file = weights_file.read(tmp_path / "checkpoint.pt", "denoiser")
    assert [adapter.num_classes(file, 0.1) for adapter in published.adapters] == [CLASSES, 0]
    assert [adapter(published).recognizes(file, "ema") for adapter in published.adapters[:1]] == [True]
    torch.save({"ema": {k: v for k, v in weights().items() if "attn.k." not in k}}, tmp_path / "broken.pt")
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.k\.weight"):
        load(ditdh(), tmp_path / "broken.pt")
    torch.save({"ema": ditdh().state_dict()}, tmp_path / "own.pt")
    load(ditdh(), tmp_path / "own.pt")


def randomized(**options) -> DiTDH:
    denoiser, g = ditdh(**options), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*denoiser.parameters(), denoiser.t_embedder.W):
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
    return denoiser


def test_the_base_sees_time_and_class_as_tokens_after_the_patches():
    """By explicit concatenation behind the patch tokens, and attention with a rotation of the patches alone."""
    m, (x, e, t, condition) = randomized(), inputs()
    x_t = Flow().sample(x, t, e).x_t

    def attention(a, h):
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (a.q, a.k, a.v))
        q, k = ((p / p.square().mean(-1, keepdim=True).add(1e-6).sqrt()) * n.weight for p, n in
                ((q, a.q_norm), (k, a.k_norm)))  # fmt: skip
        q, k = (torch.cat([rotate(p[..., :16, :], *m.enc_feat_rope()), p[..., 16:, :]], dim=-2) for p in (q, k))
        shares = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        return a.proj((shares @ v).transpose(1, 2).flatten(2))

    time = m.t_embedder(t, torch.float64)[:, None]
    label = m.y_embedder.embedding_table.weight[condition.label][:, None]
    s = torch.cat([m.s_embedder(x_t), m.time_tokens + time, m.class_tokens + label], dim=1)
    assert s.shape == (4, 16 + 2 + 3, 16)
    after = []
    for block in m.blocks[:3]:
        s = s + attention(block.attn, block.norm1(s))
        h = block.norm2(s)
        s = s + block.mlp.w3(F.silu(block.mlp.w1(h)) * block.mlp.w2(h))
        after.append(s[:, :16])
    several = randomized(align_depth=[1, 3])
    for found in (several.tokens(x_t, t, condition), several(x_t, t, condition).tokens):
        close(found[0], after[0])
        close(found[1], after[2])
    close(m.tokens(x_t, t, condition), after[0])


def test_without_the_options_the_network_and_its_numbers_are_the_same():
    torch.manual_seed(0)
    plain = DiTDH(LATENT, CLASSES, **SIZE)
    assert not {"time_tokens", "class_tokens", "early_layer.linear.weight"} & plain.state_dict().keys()
    torch.manual_seed(0)
    early = DiTDH(LATENT, CLASSES, **SIZE, early_depth=3)
    early.load_state_dict(plain.state_dict() | {k: v for k, v in early.state_dict().items() if "early" in k})
    x, _, t, condition = inputs()
    found, expected = (m(x.float(), t.float(), condition) for m in (early, plain))
    assert torch.equal(found.velocity, expected.velocity) and torch.equal(found.tokens, expected.tokens)
    assert expected.early is None and found.early.shape == x.shape


def test_residual_streams_in_context_are_fp32_under_autocast():
    denoiser, streams = DiTDH(LATENT, CLASSES, **SIZE | RAEV2), []
    for block in denoiser.units():
        block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    x, _, t, condition = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = denoiser(x.float(), t.float(), condition)
    assert [x.dtype for x in (*streams, out.tokens, out.velocity, out.early)] == [torch.float32] * 8
    low = denoiser.to(torch.bfloat16)(x.bfloat16(), t.bfloat16(), condition)
    assert low.tokens.dtype == torch.bfloat16 and low.early.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_tokens": 0}, "time_tokens = 0 and denoiser.class_tokens = 3: expected both above 0"),
        ({"class_tokens": -1}, "class_tokens = -1: expected both above 0"),
        ({"early_depth": 4}, r"early_depth = 4 .*expected 0 \(none\) to 3, the base's depth"),
        ({"early_weight": -1.0}, "early_weight = -1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ditdh(**options)


class Linear(Denoiser):
    """v = a x + label and, early, b x, so that every guided step can be computed by hand; counts its images."""

    null_label, label_dropout, early_depth = 10, 0.0, 1

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, condition):
        self.sizes.append(len(x))
        return DenoiserOutput(1.0 * x + condition.label[:, None, None, None], x[:, 0], early=0.5 * x)


X = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
LABEL = Condition(torch.tensor([3]))


def test_internal_guidance_leads_away_from_the_early_prediction_inside_the_interval():
    denoiser = Linear()
    z = sample_ode(denoiser, X, LABEL, steps=2, guidance=Guidance(2.0, 0.6, 1.0, "internal"))
    first = 2.0 - 0.5 * (0.5 * 2 + 2 * ((2 + 3) - 0.5 * 2))  # guided at t = 1
    assert z.item() == pytest.approx(first - 0.5 * (first + 3), abs=1e-12)  # not at t = 0.5
    assert denoiser.sizes == [1, 1], "one evaluation of one image per step"


def test_the_sde_guides_drifts():
    """The score is affine in the velocity, so that guided drifts are drifts of guided velocities."""
    noise = {"step_noise": lambda i: torch.ones_like(X)}
    z = sample_sde(Linear(), X, LABEL, steps=2, guidance=Guidance(3.0, kind="internal"), **noise)

    def drift(x: float, t: float) -> float:
        v = 0.5 * x + 3 * ((x + 3) - 0.5 * x)
        return v + t * (x + (1 - t) * v) / t  # v - t * score, with the score -(x + (1 - t) v) / t of the linear path

    x = 2.0 + (0.04 - 1.0) * drift(2.0, 1.0) + (2 * 0.96) ** 0.5
    assert z.item() == pytest.approx(x - 0.04 * drift(x, 0.04), abs=1e-10)


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
def test_scale_one_is_no_guidance_bit_for_bit(method):
    def run(guidance):
        denoiser = Linear()
        z = SAMPLERS[method](denoiser, X, LABEL, steps=4, guidance=guidance, step_noise=lambda i: torch.ones_like(X))
        return z, denoiser.sizes

    plain, one, guided = (run(g) for g in (Guidance(), Guidance(1.0, kind="internal"), Guidance(1.5, kind="internal")))
    assert torch.equal(plain[0], one[0]) and not torch.equal(plain[0], guided[0])
    assert plain[1] == guided[1]


def image_sampler(recipe: Recipe, denoiser: Denoiser, guide: Denoiser | None = None) -> ImageSampler:
    m = Modules(tokenizer=Identity(), denoiser=denoiser, latent_norm=LatentNorm(3), flow=Flow())
    return ImageSampler(SamplingPlan(guidance=Guidance(2.0, kind="internal")), recipe, m, LatentShape(3, 4, 4), guide)


def test_a_denoiser_without_an_early_prediction_is_refused():
    class WithClass(Recipe):
        def denoised(self, m):
            return {"class_token": (7,)}

    denoiser = Linear()
    image_sampler(Recipe(), denoiser)  # needs no label dropout
    with pytest.raises(ValueError, match=r"for latents alone, but the recipe also denoises class_token"):
        image_sampler(WithClass(), denoiser)
    denoiser.early_depth = 0
    with pytest.raises(ValueError, match=r"an alignment head predicts features.*Set denoiser.early_depth"):
        image_sampler(Recipe(), denoiser)
    image_sampler(Recipe(), denoiser, guide=Linear())


def test_a_config_without_an_early_prediction_is_refused(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    options = ["--sampling.guidance_kind=internal"]
    with pytest.raises(ConfigError, match=r"sampling.guidance = 4.0: internal guidance needs .*early_depth"):
        assemble.check(config.load(str(tmp_path / "toy.toml"), options), 1)
    assemble.check(config.load(str(tmp_path / "toy.toml"), [*options, "--sampling.guidance=1.0"]), 1)


@pytest.mark.long
def test_trains_and_samples_with_internal_guidance(tmp_path, capsys):
    """Every weight learns, the pictures and the sample command are guided, and a conflicting guide is named."""
    toml, run = tmp_path / "toy.toml", tmp_path / "run"
    toml.write_text(toys.TOML)
    options = ["--denoiser.name=ditdh", "--denoiser.patch_size=2", "--denoiser.head_width=48",
               "--denoiser.head_heads=2", "--denoiser.time_tokens=2", "--denoiser.class_tokens=2",
               "--denoiser.early_depth=2", "--denoiser.prediction=data", "--denoiser.label_dropout=0.0",
               "--sampling.guidance_kind=internal"]  # fmt: skip
    trainer = Trainer(config.load(str(toml), [f"--run.dir={run}", *options]), World())
    before = {key: p.detach().clone() for key, p in trainer.parts.modules.denoiser.named_parameters()}
    steps = finished(trainer)["steps"]
    assert all(np.isfinite(values["denoiser/early_velocity"]) for values in steps)
    after = dict(trainer.parts.modules.denoiser.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(value, after[key])]

    assert main(["sample", str(run), "--num-samples=2", "--steps=2"]) == 0
    assert [path.name for path in (run / "samples").glob("*-ema-euler2-internal4-seed0")]
    assert main(["sample", str(run), "--num-samples=2", "--guidance-kind=classifier_free"]) == 2
    assert "label_dropout is 0" in capsys.readouterr().err
    assert main(["sample", str(run), "--guide=other", "--guidance-kind=internal"]) == 2
    assert "--guide=other replaces --guidance-kind=internal" in capsys.readouterr().err


def test_terms_of_a_denoiser_without_an_early_prediction_are_as_before():
    x, e, t, condition = inputs()
    path, m = Flow().sample(x, t, e), Modules(denoiser=randomized(early_depth=0))
    out = m.denoiser(path.x_t, t, condition)
    expected = (out.velocity - path.velocity).square().mean()
    (name, term), = denoising(m, path, t, condition).items()  # fmt: skip
    assert name == "velocity" and isinstance(term, LossTerm) and torch.equal(term.value, expected)
