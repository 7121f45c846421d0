"""The adaptive weight of the generator loss: by plain autograd on the whole graph, on ranks, and compiled."""

import json

import pytest
import torch
from torch import nn

from components import registry
from components.contracts import LossTerm
from components.diffusion.losses import reconstruction
from components.distributed.parallel import World
from components.nn.last_layer import LastLayer
from plugins.losses.patchgan import PatchGAN
from plugins.tokenizers.rae import RAE
from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import compiled_by_aot_eager
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

registry.discover("plugins")
RAE_TABLE = """name = "rae"
encoder = "tiny_vit"
resolution = 32
patch_size = 4
width = 16
depth = 2
heads = 2
"""
PIXELS = torch.full((1, 3, 1, 1), 0.4, dtype=torch.float64), torch.full((1, 3, 1, 1), 0.2, dtype=torch.float64)


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML.replace("[losses.patchgan]", "[losses.patchgan]\nadaptive = true"))
    return str(path)


@pytest.mark.parametrize("kind", ["autoencoder_kl", "rae"])
def test_against_plain_autograd(kind, monkeypatch):
    """VQGAN's equation, with the gradients of the whole graph; and the gradients of every weight of the tokenizer."""
    m, (batch, random) = toys.modules(), toys.batch()
    m.discriminator = PatchGAN(channels=8, layers=2, weight=0.3, adaptive=True).double()
    if kind == "rae":
        m.tokenizer = RAE(encoder="tiny_vit", resolution=32, patch_size=4, width=16, depth=1, heads=2).double()
        monkeypatch.setattr(type(m.tokenizer.encoder), "pixel_stats", PIXELS)
        del m.reconstruction["kl"]
    m.reconstruction["l1"].weight = 2.0
    layer = m.tokenizer.last_layer()
    m.last_layer = LastLayer(layer)

    def forward():
        posterior = m.tokenizer.encode(batch.images)
        z = posterior.mean + 0.1 * random["posterior"] if kind != "rae" else posterior.mean
        return posterior, m.tokenizer.decode(z)

    posterior, x_hat = forward()
    terms = reconstruction(m, batch.images, x_hat, posterior, 0)
    sum(weight * value for weight, value in terms.values()).backward()
    found = {name: p.grad for name, p in m.tokenizer.named_parameters()}

    for p in m.tokenizer.parameters():
        p.grad = None
    posterior, x_hat = forward()
    values = {name: loss(batch.images, x_hat, posterior) for name, loss in m.reconstruction.items()}
    rec = sum(m.reconstruction[name].weight * value for name, value in values.items())
    gan = -m.discriminator.network(x_hat).mean()
    of_rec, of_gan = (torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (rec, gan))
    factor = (of_rec / (of_gan + 1e-4)).detach()
    (rec + 0.3 * factor * gan).backward()
    torch.testing.assert_close(terms["gan_weight"].value, factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["gan"].weight, 0.3 * factor, rtol=1e-12, atol=0)
    assert terms["gan_weight"].weight == 0 and not terms["gan_weight"].value.requires_grad
    for name, value in {**values, "gan": gan}.items():
        torch.testing.assert_close(terms[name].value, value, rtol=1e-12, atol=0)
    for name, p in m.tokenizer.named_parameters():
        assert (p.grad is None) == (found[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-13)


def test_before_its_start_the_loss_has_no_factor_and_a_large_factor_is_cut():
    m, (batch, _) = toys.modules(), toys.batch()
    m.discriminator, m.last_layer = (
        PatchGAN(channels=8, layers=2, start_step=5).double(),
        LastLayer(m.tokenizer.last_layer()),
    )
    posterior = m.tokenizer.encode(batch.images)
    terms = reconstruction(m, batch.images, m.tokenizer.decode(posterior.mean), posterior, 4)
    assert terms["gan"] == LossTerm(m.discriminator.weight, terms["gan"].value) and "gan_weight" not in terms
    with torch.no_grad():
        for p in m.discriminator.network.main[-1].parameters():
            p.mul_(1e-12)
    m.discriminator.adaptive_eps = 1e-12
    terms = reconstruction(m, batch.images, m.tokenizer.decode(posterior.mean), posterior, 5)
    assert terms["gan_weight"].value == 1e4
    nn.init.constant_(m.discriminator.network.main[0].bias, torch.nan)
    terms = reconstruction(m, batch.images, m.tokenizer.decode(posterior.mean), posterior, 5)
    assert sum(weight * value for weight, value in terms.values()).isnan(), "the step must be skipped"
    with pytest.raises(ValueError, match="with zero padding, got LayerNorm"):
        LastLayer(nn.LayerNorm(3))


def train(rank: int, world: int, toml: str, folder: str, options: list[str]) -> None:
    torch.set_num_threads(1)
    Trainer(config.load(toml, [f"--run.dir={folder}", "--training.precision=fp64", *options]), World(rank, world)).run()


def numbers(folder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("tokenizer/", "discri", "grad_norm/"))} for line in lines]


def assert_same(one, other) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


STEPS = ["--training.steps=3", "--run.checkpoint_every=0", "--optimizer.lr=1e-3", "--recipe.name=tokenizer",
         "--losses.patchgan.start_step=1", "--losses.patchgan.warmup_steps=1"]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "options"),
    [("autoencoder_kl", ["fsdp"]), ("autoencoder_kl", ["fsdp", "--training.accumulation=2"]), ("rae", ["ddp"])],
    ids=str,
)
def test_two_ranks_are_one(toml, tmp_path, kind, options):
    """With accumulation, each micro-batch has its own factor; there, FSDP is compared with DDP on two ranks."""
    text = (tmp_path / "toy.toml").read_text()
    if kind == "rae":
        head, rest = text.split("[tokenizer]\n")
        text = head + f"[tokenizer]\n{RAE_TABLE}\n" + rest[rest.index("[denoiser]") :]
        text = text.replace("[losses.kl]\n", "")
    (tmp_path / "toy.toml").write_text(text)
    strategy, *more = options
    more += ["--recipe.name=rae_decoder"] if kind == "rae" else []
    run_ranks(train, 2, toml, str(tmp_path / "two"), [*STEPS, f"--parallel.strategy={strategy}", *more])
    if "--training.accumulation=2" in more:
        run_ranks(train, 2, toml, str(tmp_path / "one"), [*STEPS, "--parallel.strategy=ddp", *more])
    else:
        train(0, 1, toml, str(tmp_path / "one"), [*STEPS, *more])
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert "tokenizer/gan_weight" not in one[0] and one[1]["tokenizer/gan_weight"] > 0
    assert one[0]["discriminator/hinge"] > 0 == one[0]["tokenizer/gan"]
    assert_same(one, two)


@pytest.mark.long
def test_compiled_code_computes_the_same(toml, tmp_path):
    """The last layer stays out of compiled code, which would free what a second backward pass needs."""
    small = [*STEPS, "--training.resolution=16", "--tokenizer.multipliers=[1,2]", "--losses.patchgan.layers=1"]
    train(0, 1, toml, str(tmp_path / "eager"), small)
    with compiled_by_aot_eager():
        train(0, 1, toml, str(tmp_path / "compiled"), [*small, "--training.compile=true"])
    assert_same(numbers(tmp_path / "eager"), numbers(tmp_path / "compiled"))


def test_a_tokenizer_without_a_last_layer_is_refused(toml, monkeypatch):
    from plugins.tokenizers.autoencoder_kl import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "last_layer", lambda self: None)
    with pytest.raises(
        ConfigError, match=r"\[losses.patchgan\] adaptive = true needs .*'autoencoder_kl' does not name"
    ):
        assemble.check(config.load(toml), 1)
    assert assemble.check(config.load(toml, ["--recipe.name=repa"]), 1).modules.last_layer is None
