"""REG (arXiv 2507.01467): its numbers, sampling and training, and what it refuses.

tests/data/published_reg.npz was recorded from the published REG code in float64 at a tiny size (width 32, two blocks,
latents 4 x 8 x 8, class tokens of 24 features) with random weights: outputs and losses of one batch, and samples.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from components import registry
from components.contracts import Batch, Condition, LatentShape, Modules
from components.diffusion.flow import Flow
from components.diffusion.image_sampler import ImageSampler, Joint, SamplingPlan
from components.diffusion.samplers import Guidance, sample_sde
from components.distributed.materialize import materialize
from components.distributed.parallel import World
from components.nn.latent_norm import LatentNorm
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine
from plugins.recipes.reg import Reg
from tests.support import DATA, toys
from tests.support.ranks import run_ranks
from tests.support.runs import finished, largest_difference
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("module_registry")]

torch.set_num_threads(1)
RECORDED = {key: torch.from_numpy(value) for key, value in np.load(DATA / "published_reg.npz").items()}
LATENT, DIM = LatentShape(4, 8, 8), 24


def published() -> tuple[SiT, nn.ModuleList]:
    """Denoiser and heads with the recorded weights, loaded by the published names."""
    state = {key.removeprefix("init/"): v.double() for key, v in RECORDED.items() if key.startswith("init/")}
    denoiser = SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1, class_token_dim=DIM).double()
    heads = Cosine(head_width=16).make_heads(32, [DIM], 4).double()
    heads.load_state_dict({k.removeprefix("projectors."): v for k, v in state.items() if k.startswith("projectors.")})
    own = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    denoiser.load_state_dict(own | {"pos_embed": RECORDED["pos_embed"].double()})
    fresh = SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1, class_token_dim=DIM)
    torch.testing.assert_close(fresh.pos_embed, RECORDED["pos_embed"])
    return denoiser, heads


def close(ours: torch.Tensor, name: str) -> None:
    recorded = RECORDED[name].double()
    difference = ((ours - recorded).abs().max() / recorded.abs().max()).item()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-10


class Given(nn.Module):
    """Stand-in for tokenizer, latent norm and encoder: returns the recorded values."""

    embed_dim = DIM

    def __init__(self) -> None:
        super().__init__()
        self.given = {k.removeprefix("in/"): v.double() for k, v in RECORDED.items() if k.startswith("in/")}

    def encode(self, images):
        return SimpleNamespace(sample=lambda noise: self.given["x"])

    def forward(self, x):
        return x if x.shape[1] == LATENT.channels else self.given["target"][:, 1:]

    def embed(self, images):
        return self.given["cls"]


def test_outputs_and_losses_are_those_of_the_published_code():
    denoiser, heads = published()
    parts = Given()
    given, labels = parts.given, Condition(parts.given["labels"].long())
    m = Modules(parts, denoiser, heads, parts, {"dino": parts}, alignment=Cosine(head_width=16), flow=Flow())
    draws = {"posterior": given["noise"], "noise": given["noise"], "time": given["t"], "label": torch.ones(3)}
    draws["class_noise"] = given["cls_noise"]
    terms = {}
    Reg().step(m, Batch(torch.zeros(3, 3, 32, 32), labels), draws, lambda group, made: terms.update(made), 0)
    torch.testing.assert_close(terms["velocity"].value, RECORDED["out/denoising_loss"].mean())
    torch.testing.assert_close(terms["class_velocity"].value, RECORDED["out/cls_loss"].mean())
    assert {name: term.weight for name, term in terms.items()} == {
        "velocity": 1.0, "class_velocity": 0.03, "align": 0.5,
    }  # fmt: skip
    # The recording aligns the class token with a separate target, to distinguish it from the denoised token.
    parts.given["target"][:, 0] = given["cls"]
    path, class_path = (
        m.flow.sample(given[x], given["t"], given[e]) for x, e in (("x", "noise"), ("cls", "cls_noise"))
    )
    out = denoiser(path.x_t, given["t"], labels, class_token=class_path.x_t)
    close(out.velocity, "out/velocity")
    close(out.others["class_token"], "out/cls_velocity")
    close(m.alignment.align([heads[0](out.tokens)], [RECORDED["in/target"].double()]), "out/proj_loss")
    by_hand = m.alignment.align([heads[0](out.tokens)], [parts.given["target"]])
    torch.testing.assert_close(terms["align"].value, by_hand)
    assert torch.equal(denoiser.tokens(path.x_t, given["t"], labels, class_token=class_path.x_t), out.tokens)


@pytest.mark.parametrize(("name", "guidance"), [("cfg1", Guidance()), ("cfg2", Guidance(2.3, 0.0, 0.85))])
def test_samples_are_those_of_the_published_code(name, guidance):
    """The sampler treats latent and class token as one state, with the same guidance."""
    s = {k.removeprefix("sampling/"): v for k, v in RECORDED.items() if k.startswith("sampling/")}
    joint = Joint(published()[0], LATENT, {"class_token": (DIM,)})

    def state(latents, classes):
        return torch.cat([latents.double().flatten(1), classes.double()], dim=1)

    final = sample_sde(
        joint, state(s["noise"], s["cls_noise"]), Condition(s["labels"]), steps=6, flow=Flow(), guidance=guidance,
        step_noise=lambda i: state(s["eps"][i], s["cls_eps"][i]),
    )  # fmt: skip
    close(joint.split(final)[0], f"sampling/{name}")


class Decoder:
    """A tokenizer that shows the latent's first channels."""

    def decode(self, z):
        return z[:, :3]


def sampler(guide=None, **options) -> ImageSampler:
    m = Modules(Decoder(), published()[0], latent_norm=LatentNorm(4).double(), flow=Flow())
    return ImageSampler(SamplingPlan(steps=3, **options), Reg(), m, LATENT, guide)


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
def test_an_image_does_not_depend_on_its_neighbors(method):
    images = sampler(method=method)([0, 1, 2], Condition(torch.tensor([1, 2, 3])))
    assert images.shape == (3, 3, 8, 8) and images.isfinite().all()
    torch.testing.assert_close(sampler(method=method)([2], Condition(torch.tensor([3]))), images[2:])
    guided = sampler(method=method, guidance=Guidance(2.0))([2], Condition(torch.tensor([3])))
    assert not torch.allclose(guided, images[2:])


def test_a_guide_must_denoise_the_same():
    sampler(guide=published()[0], guidance=Guidance(2.0))([0], Condition(torch.tensor([1])))
    with pytest.raises(ValueError, match="guide"):
        sampler(guide=SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1))


def test_every_weight_is_initialized_from_the_meta_device():
    with torch.device("meta"):
        net = SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1, class_token_dim=DIM, qk_norm=True)
    materialize(net, torch.device("cpu"))
    torch.testing.assert_close(net.pos_embed, RECORDED["pos_embed"])
    condition = Condition(torch.tensor([0, 10]))
    out = net(torch.randn(2, *LATENT), torch.rand(2), condition, torch.randn(2, DIM))
    # Zero output layers: a new network predicts zero for both.
    assert (
        not out.velocity.any() and not out.others["class_token"].any() and out.others["class_token"].shape == (2, DIM)
    )


# -- runs --------------------------------------------------------------------------------------------------------

PLUGIN = """
from components.registry import encoders
from plugins.encoders.tiny_vit import TinyViT


@encoders.register("patches_only")
class PatchesOnly(TinyViT):
    own_embedding = False
"""
REG = ["--recipe.name=reg", "--denoiser.class_token_dim=96"]


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reg")
    (folder / "patches_only.py").write_text(PLUGIN)
    (folder / "toy.toml").write_text('plugins = ["patches_only.py"]\n' + toys.TOML)
    return str(folder / "toy.toml")


def trained(rank: int, world: int, toml: str, options: list[str]) -> dict:
    registry.discover("plugins")
    options = ["--training.precision=fp64", "--training.steps=2", "--run.async_checkpoints=false", *REG, *options]
    return finished(
        Trainer(config.load(toml, [f"--run.dir={Path(toml).parent}/{world}", *options]), World(rank, world))
    )


def test_trains_and_is_the_same_on_two_ranks(toml):
    # With pictures during training: the samplers integrate the class token, too.
    one = trained(0, 1, toml, ["--sampling.every=2", "--sampling.method=sde"])
    steps = one["steps"]
    assert {"denoiser/velocity", "denoiser/class_velocity", "denoiser/align"} <= steps[0].keys()
    for values in steps:
        total = values["denoiser/velocity"] + 0.03 * values["denoiser/class_velocity"] + 0.5 * values["denoiser/align"]
        assert values["denoiser/loss"] == pytest.approx(total, rel=1e-12)
    assert one["weights"]["denoiser.final_layer.linear_cls.weight"].any(), "the class token's velocity is learned"
    for found in run_ranks(trained, 2, toml, ["--parallel.shard_frozen"]):
        differences = largest_difference(one, found)
        print(differences)
        assert max(differences.values()) < 1e-8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--denoiser.class_token_dim=0"], ["class_token_dim = 96", "none"]),
        (["--denoiser.class_token_dim=64"], ["class_token_dim = 96", "takes 64"]),
        (["--encoders.tiny_vit.name=patches_only"], ["encoders.tiny_vit", "class token", "dinov2"]),
        (["--latent_cache.path=somewhere"], ["latent_cache.path", "reg"]),
    ],
    ids=["none", "dimension", "encoder", "cache"],
)
def test_what_cannot_work_is_refused_before_the_run(toml, options, said):
    with pytest.raises(ConfigError) as refusal:
        assemble.check(config.load(toml, [*REG, *options]), 1)
    assert all(text in str(refusal.value) for text in said), refusal.value


def test_a_denoiser_with_a_class_token_needs_one():
    net = SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1, class_token_dim=DIM)
    x, t, labels = torch.randn(1, *LATENT), torch.rand(1), Condition(torch.tensor([1]))
    with pytest.raises(ValueError, match="class_token_dim = 24"):
        net(x, t, labels)
    plain = SiT(LATENT, 10, width=32, depth=2, heads=4, align_depth=1)
    with pytest.raises(ValueError, match="class_token_dim = 0"):
        plain(x, t, labels, torch.randn(1, DIM))
