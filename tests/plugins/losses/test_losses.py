"""Reconstruction, adversarial and alignment losses against their formulas."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components import registry
from components.contracts import AdversarialLoss, AlignmentLoss, Posterior, ReconstructionLoss
from components.files.weights import WeightsError
from plugins.losses.cosine import Cosine
from plugins.losses.dino_gan import DinoGAN
from plugins.losses.lpips import LPIPS
from plugins.losses.patchgan import PatchGAN
from plugins.losses.reconstruction import KL, L1, L2
from tests.support.ranks import run_ranks

LOSSES = {"l1": L1, "l2": L2, "kl": KL, "lpips": LPIPS, "patchgan": PatchGAN, "dino_gan": DinoGAN, "cosine": Cosine}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(batch: int = 4, side: int = 32, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, x_hat = (torch.rand(batch, 3, side, side, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return x.to(dtype), x_hat.to(dtype)


def gan(**options) -> PatchGAN:
    torch.manual_seed(0)
    return PatchGAN(**{"channels": 8} | options).double()


def torch_discriminator(ours: PatchGAN, channels: int = 8) -> nn.Sequential:
    """The published discriminator built from torch's layers, with the same weights."""
    c = channels
    act = nn.LeakyReLU(0.2)
    main = nn.Sequential(
        nn.Conv2d(3, c, 4, 2, 1),
        act,
        nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * c),
        act,
        nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4 * c),
        act,
        nn.Conv2d(4 * c, 8 * c, 4, 1, 1, bias=False),
        nn.BatchNorm2d(8 * c),
        act,
        nn.Conv2d(8 * c, 1, 4, 1, 1),
    )
    main.load_state_dict({key.removeprefix("main."): v for key, v in ours.network.state_dict().items()})
    return main.double().train()


def grads(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("name", LOSSES)
def test_registered_and_every_option_documented(name):
    plugin = registry.losses.get(name)
    assert plugin.cls is LOSSES[name]
    assert plugin.summary and all(option.doc for option in plugin.options.values())
    kinds = inspect.signature(plugin.cls.__init__).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in kinds if p.name != "self")


@pytest.mark.parametrize("name", LOSSES)
def test_built_on_the_meta_device(name):
    with torch.device("meta"):
        loss = LOSSES[name]()
    if isinstance(loss, nn.Module) and loss.state_dict():
        assert {t.device.type for t in loss.state_dict().values()} == {"meta"}


def test_contracts():
    assert all(isinstance(LOSSES[name](), ReconstructionLoss) for name in ("l1", "l2", "kl"))
    assert isinstance(gan(), AdversarialLoss) and not isinstance(gan(), AlignmentLoss)
    assert isinstance(Cosine(), AlignmentLoss) and not isinstance(Cosine(), AdversarialLoss)
    assert [LOSSES[name]().weight for name in ("l1", "l2", "kl", "patchgan")] == [1.0, 1.0, 1e-6, 0.1]
    assert L1(weight=0.3).weight == 0.3


def test_reconstruction_formulas():
    x, x_hat = images()
    g = torch.Generator().manual_seed(1)
    mean, logvar = (torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    posterior = Posterior(mean, logvar)
    torch.testing.assert_close(L1()(x, x_hat, posterior), F.l1_loss(x_hat, x))
    torch.testing.assert_close(L2()(x, x_hat, posterior), F.mse_loss(x_hat, x))
    q, p = torch.distributions.Normal(mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(q, p).sum((1, 2, 3)).mean()
    torch.testing.assert_close(KL()(x, x_hat, posterior), expected)


@pytest.mark.parametrize("loss", [L1(), L2(), KL()], ids=["l1", "l2", "kl"])
def test_reconstruction_precision(loss):
    x, x_hat = images(dtype=torch.bfloat16)
    z = torch.linspace(-3, 3, 64).view(4, 4, 2, 2).bfloat16()
    got = loss(x, x_hat, Posterior(z, z))
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(x.float(), x_hat.float(), Posterior(z.float(), z.float())))
    x, x_hat = images()
    assert loss(x, x_hat, Posterior(z.double(), z.double())).dtype == torch.float64


def test_discriminator_has_the_published_keys_and_initialization():
    torch.manual_seed(0)
    state = PatchGAN().network.state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = ["main.0.weight", "main.0.bias"]
    for conv in (2, 5, 8):
        expected += [f"main.{conv}.weight", *(f"main.{conv + 1}.{key}" for key in norm)]
    assert list(state) == [*expected, "main.11.weight", "main.11.bias"]
    assert state["main.8.weight"].shape == (512, 256, 4, 4)
    for key in ("main.0.weight", "main.5.weight", "main.11.weight"):
        assert abs(state[key].std() - 0.02) < 1e-3 and abs(state[key].mean()) < 1e-3
    assert abs(state["main.9.weight"].std() - 0.02) < 3e-3 and abs(state["main.9.weight"].mean() - 1) < 3e-3
    assert torch.equal(state["main.9.bias"], torch.zeros(512))


def test_gan_formulas():
    loss = gan()
    reference = torch_discriminator(loss)
    x, x_hat = images()
    x_hat.requires_grad_()
    generator = loss.generator(x_hat, 0)
    torch.testing.assert_close(generator, -reference(x_hat).mean())
    generator.backward()
    assert x_hat.grad.abs().sum() > 0
    loss.zero_grad()

    terms, report = loss.discriminator(x, x_hat.detach(), 0)
    real, fake = reference(x), reference(x_hat.detach())  # two batches, each with its own statistics
    expected = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    torch.testing.assert_close(terms, {"hinge": expected})
    torch.testing.assert_close(report, {"logits_real": real.mean().detach(), "logits_fake": fake.mean().detach()})
    terms["hinge"].backward()
    expected.backward()
    torch.testing.assert_close(grads(loss), grads(reference))
    # The order of the three batches affects the running statistics.
    torch.testing.assert_close(loss.network.main[9].running_mean, reference[9].running_mean)
    assert loss.network(x).shape == (4, 1, 2, 2)


def test_batch_statistics_in_eval_mode_too():
    loss = gan()
    x, _ = images()
    assert torch.equal(loss.eval().network(x), loss.train().network(x))


def test_nothing_happens_before_the_start_step():
    loss = gan(start_step=3, lecam_weight=1.0)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    x, x_hat = images()
    terms, report = loss.discriminator(x, x_hat, 2)
    assert loss.generator(x_hat, 2) == 0 and sum(terms.values()) == 0 and not report
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    assert loss.generator(x_hat, 3) != 0 and set(loss.discriminator(x, x_hat, 3)[0]) == {"hinge", "lecam"}


def test_lecam():
    loss = gan(lecam_weight=0.01, lecam_decay=0.9)
    reference = torch_discriminator(loss)
    x, x_hat = images()
    ema_real, ema_fake = 0.0, 0.0
    for batch in (x, 0.5 * x, x.flip(0) + 0.1):
        terms, _ = loss.discriminator(batch, x_hat, 0)
        real, fake = reference(batch).mean(), reference(x_hat).mean()
        expected = 0.01 * (F.relu(real - ema_fake) ** 2 + F.relu(ema_real - fake) ** 2)
        torch.testing.assert_close(terms["lecam"], expected)
        ema_real = 0.9 * ema_real + 0.1 * real.detach()
        ema_fake = 0.9 * ema_fake + 0.1 * fake.detach()
        torch.testing.assert_close((loss.ema_real, loss.ema_fake), (ema_real, ema_fake))
    assert expected > 0
    terms["lecam"].backward()
    expected.backward()
    torch.testing.assert_close(grads(loss), grads(reference))


def discriminator_rank(rank: int, world: int) -> dict:
    loss = gan(lecam_weight=1.0)
    # With these averages, both halves of LeCam are nonzero.
    loss.ema_real.fill_(5.0)
    loss.ema_fake.fill_(-5.0)
    x, x_hat = (image.chunk(world)[rank] for image in images())
    terms, _ = loss.discriminator(x, x_hat, 0)
    sum(terms.values()).backward()
    return {"terms": {k: v.detach() for k, v in terms.items()}, "grads": grads(loss), **dict(loss.named_buffers())}


def test_two_ranks_are_one_large_batch():
    results = run_ranks(discriminator_rank, 2)
    whole = discriminator_rank(0, 1)
    mean = [sum(pair) / 2 for pair in zip(*(r["grads"] for r in results))]
    torch.testing.assert_close(mean, whole["grads"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(r["terms"]["hinge"] for r in results) / 2, whole["terms"]["hinge"])
    for key, value in whole.items():
        if key not in ("terms", "grads"):
            torch.testing.assert_close(results[0][key], value)
            assert torch.equal(results[0][key], results[1][key]), f"{key} differs between ranks"


def test_gan_precision():
    torch.manual_seed(0)
    loss = PatchGAN(channels=8)
    x, x_hat = images(dtype=torch.bfloat16)
    expected = loss.generator(x_hat.float(), 0), loss.discriminator(x.float(), x_hat.float(), 0)[0]["hinge"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss.generator(x_hat, 0), loss.discriminator(x, x_hat, 0)[0]["hinge"]
    assert got[0].dtype == torch.float32 and torch.equal(torch.stack(got), torch.stack(expected))
    assert PatchGAN(start_step=9).generator(x_hat, 0).dtype == torch.float32


def test_gan_convolutions_follow_the_run_only_where_asked():
    """precision = "run": convolutions in autocast's dtype; batch norms, their statistics, logits and losses in fp32."""
    losses = []
    for precision in ("fp32", "run"):
        torch.manual_seed(0)
        losses.append(PatchGAN(channels=8, precision=precision))
    exact, rounded = losses
    seen = {}
    for module in rounded.network.main:
        module.register_forward_hook(lambda m, inputs, y: seen.setdefault(type(m).__name__, set()).add(y.dtype))
    x, x_hat = images(dtype=torch.float32)
    assert torch.equal(rounded.network(x), exact.network(x))
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, expected = rounded.network(x), exact.network(x)
        terms, _ = rounded.discriminator(x, x_hat, 0)
    assert seen["Conv2d"] == {torch.bfloat16} and seen["SyncBatchNorm2d"] == {torch.float32}
    assert logits.dtype == terms["hinge"].dtype == torch.float32
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    terms["hinge"].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in rounded.network.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(rounded.network, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("side, layers, message", [(23, 3, "24 px.*at most 2"), (11, 2, "12 px.*at most 1")])
def test_images_that_are_too_small(side, layers, message):
    x, x_hat = images(side=side)
    loss = gan(layers=layers, start_step=10)
    for call in (lambda: loss.generator(x_hat, 0), lambda: loss.discriminator(x, x_hat, 0)):
        with pytest.raises(ValueError, match=rf"\[losses.patchgan\] layers = {layers}.*{message}"):
            call()
    x, x_hat = images(side=side + 1)
    assert gan(layers=layers).network(x).shape[-1] == 1


def test_too_few_layers():
    with pytest.raises(ValueError, match="layers = 0"):
        PatchGAN(layers=0)


def test_discriminator_checkpoint(tmp_path):
    trained = gan()
    path = tmp_path / "discriminator.pt"
    torch.save(trained.network.state_dict(), path)
    torch.manual_seed(1)
    loss = PatchGAN(channels=8, checkpoint=str(path)).double()
    assert not torch.equal(loss.network.main[2].weight, trained.network.main[2].weight)
    loss.load_weights()
    assert all(torch.equal(v, trained.network.state_dict()[k]) for k, v in loss.network.state_dict().items())
    with pytest.raises(WeightsError, match=r"discriminator.pt.*(.|\n)*main.0.weight"):
        PatchGAN(channels=4, checkpoint=str(path)).load_weights()
    before = loss.state_dict()["network.main.2.weight"].clone()
    loss.ema_real.fill_(1.0)
    loss.init_weights()
    assert not torch.equal(loss.network.main[2].weight, before) and loss.ema_real == 0


def test_discriminator_compiles_whole():
    loss = gan()
    x, _ = images()
    compiled = torch.compile(loss.units()[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss.network(x))


def test_cosine_formula():
    g = torch.Generator().manual_seed(0)
    projected, targets = ([torch.randn(3, 4, d, generator=g, dtype=torch.float64) for d in (5, 7)] for _ in range(2))
    by_hand = []
    for p, y in zip(projected, targets):
        cosines = [[p[b, n] @ y[b, n] / (p[b, n].norm() * y[b, n].norm()) for n in range(4)] for b in range(3)]
        by_hand.append(-torch.tensor(cosines, dtype=torch.float64).mean())
    loss = Cosine()
    assert (loss.tokenizer_weight, loss.denoiser_weight) == (1.5, 0.5)
    # All encoders have equal weight, whatever their number of features.
    torch.testing.assert_close(loss.align(projected, targets), torch.stack(by_hand).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.align([2 * p for p in targets], targets).item(), -1.0)


def test_cosine_precision():
    g = torch.Generator().manual_seed(0)
    p, y = (torch.randn(2, 4, 64, generator=g).bfloat16() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Cosine().align([p], [y])
    assert got.dtype == torch.float32 and torch.equal(got, Cosine().align([p.float()], [y.float()]))
    assert Cosine().align([p.double()], [y.double()]).dtype == torch.float64


def test_cosine_refuses_other_shapes():
    p, y = torch.zeros(2, 4, 8), torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match="match"):
        Cosine().align([p], [y])
    with pytest.raises(ValueError, match="match"):
        Cosine().align([p, p], [p])


def test_heads():
    heads = Cosine(head_width=16).make_heads(12, [5, 7], 4)
    assert [head(torch.zeros(2, 16, 12)).shape for head in heads] == [(2, 16, 5), (2, 16, 7)]
    state = heads[1].state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "0.weight": (16, 12),
        "0.bias": (16,),
        "2.weight": (16, 16),
        "2.bias": (16,),
        "4.weight": (7, 16),
        "4.bias": (7,),
    }
    for i in (0, 2, 4):
        fan_out, fan_in = state[f"{i}.weight"].shape
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.8 * bound < state[f"{i}.weight"].abs().max() <= bound and not state[f"{i}.bias"].any()
    tokens = torch.linspace(-1, 1, 12)
    hidden = F.silu(state["2.weight"] @ F.silu(state["0.weight"] @ tokens))
    torch.testing.assert_close(heads[1](tokens), state["4.weight"] @ hidden)


def test_the_discriminator_can_start_before_its_loss_counts():
    """Otherwise an untrained discriminator judges the reconstructions of the first steps with adversarial loss."""
    loss, (x, x_hat) = gan(start_step=10, warmup_steps=4), images()
    terms, reported = loss.discriminator(x, x_hat.detach(), 5)
    assert not terms["hinge"].requires_grad and not reported
    for step in (6, 9):
        assert loss.discriminator(x, x_hat.detach(), step)[0]["hinge"].requires_grad
        assert not loss.generator(x_hat, step).requires_grad and loss.generator(x_hat, step) == 0
    assert loss.generator(x_hat, 10) != 0
    with pytest.raises(ValueError, match="warmup_steps = 11; expected 0 to start_step = 10"):
        gan(start_step=10, warmup_steps=11)
