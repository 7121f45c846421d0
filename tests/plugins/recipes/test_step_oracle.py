"""One and three whole REPA-E steps against a plain oracle, written here from the paper without the project's code.

The oracle steps the three optimizers one after the other, as the published code does; the project's step builds all
losses first and steps at the end. Both run in float64 from the same weights, inputs and random numbers, and must agree
to 1e-9: every loss, gradient norm, weight, running statistic and average. `tests/data/step_numbers.json` also pins the
losses to numbers recorded when the project's step agreed with a recording of the published code to 1e-12.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.contracts import Batch, Condition, Encoder, LatentShape, Modules
from components.diffusion.flow import Flow
from components.diffusion.random_numbers import generator
from components.nn.latent_norm import LatentNorm
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine
from plugins.losses.lpips import LPIPS
from plugins.losses.patchgan import PatchGAN
from plugins.losses.reconstruction import KL, L1
from plugins.optimizers.adamw import AdamW
from plugins.recipes.repae import RepaE
from plugins.tokenizers.autoencoder_kl import AutoencoderKL
from tests.support import DATA
from trainer.run.step import Step

RECORDED = DATA / "step_numbers.json"
STEPS, B, WIDTH, DEPTH, HEADS, ALIGN, CLASSES, EMBED = 3, 4, 32, 3, 2, 2, 5, 24
MULTIPLIERS, VAE_CHANNELS, GROUPS = [1, 2, 2], 16, 8
LR, EMA_DECAY, DROP = 1e-4, 0.9999, 0.1


class FixedEncoder(Encoder):
    """Stand-in for a frozen encoder: returns the targets of the current batch."""

    embed_dim = EMBED

    def forward(self, images):
        return self.targets


def numbers(*key, shape, scale=1.0):
    return torch.randn(*shape, generator=generator(*key), dtype=torch.float64) * scale


def randomize(module: nn.Module, name: str) -> None:
    """Set weights by a formula without zeros, so that gates, conditioning and normalization all have an effect."""
    with torch.no_grad():
        for key, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            center = 1.0 if p.ndim == 1 and "norm" in key and key.endswith("weight") else 0.0
            p.copy_(center + numbers(name, key, shape=p.shape, scale=fan_in**-0.5 if p.ndim > 1 else 0.1))


@pytest.fixture
def modules():
    torch.manual_seed(0)
    latent = LatentShape(4, 8, 8)
    m = Modules(
        tokenizer=AutoencoderKL(channels=VAE_CHANNELS, multipliers=MULTIPLIERS, norm_groups=GROUPS, res_blocks=1),
        denoiser=SiT(latent, CLASSES, width=WIDTH, depth=DEPTH, heads=HEADS, align_depth=ALIGN, label_dropout=DROP),
        latent_norm=LatentNorm(4),
        encoders={"fixed": FixedEncoder()},
        reconstruction={"l1": L1(), "lpips": LPIPS(input_range="published"), "kl": KL()},
        discriminator=PatchGAN(channels=8, layers=2),
        alignment=Cosine(head_width=48),
        flow=Flow(),
    )
    m.heads = m.alignment.make_heads(WIDTH, [EMBED], 4)
    for name, module in m.named().items():
        randomize(module.double(), name)
    lpips = m.reconstruction["lpips"]
    lpips._fill_buffers()  # as load_weights does after reading the files
    lpips.requires_grad_(False)
    with torch.no_grad():
        for layer in lpips.linear:
            layer.weight.abs_()
    m.latent_norm.set_statistics(numbers("mean", shape=(4,), scale=0.2), numbers("std", shape=(4,)).abs() + 0.3)
    return m


def inputs(step: int):
    images = numbers("images", step, shape=(B, 3, 32, 32), scale=0.5).clamp(-1, 1)
    labels = torch.randint(CLASSES, (B,), generator=generator("labels", step))
    uniform = [torch.rand(B, generator=generator(name, step), dtype=torch.float64) for name in ("time", "drop")]
    uniform[1][0] = 0.05  # at least one label is dropped
    normal = {name: numbers(name, step, shape=(B, 4, 8, 8)) for name in ("posterior", "noise")}
    draws = normal | {"time": uniform[0], "label": uniform[1]}
    return Batch(images, Condition(labels)), draws, numbers("targets", step, shape=(B, 16, EMBED))


# -- the oracle --------------------------------------------------------------------------------------------------------


def conv(p, name, x, **kw):
    return F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), **kw)


def group_norm_silu(p, name, x):
    y = F.group_norm(x, GROUPS, p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)
    return y * torch.sigmoid(y)


def residual(p, name, x):
    h = conv(p, f"{name}.conv1", group_norm_silu(p, f"{name}.norm1", x), padding=1)
    h = conv(p, f"{name}.conv2", group_norm_silu(p, f"{name}.norm2", h), padding=1)
    return (conv(p, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x) + h


def middle(p, name, x):
    x = residual(p, f"{name}.block_1", x)
    y = F.group_norm(x, GROUPS, p[f"{name}.attn_1.norm.weight"], p[f"{name}.attn_1.norm.bias"], eps=1e-6)
    q, k, v = (conv(p, f"{name}.attn_1.{n}", y).flatten(2) for n in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1]), dim=-1)
    y = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    return residual(p, f"{name}.block_2", x + conv(p, f"{name}.attn_1.proj_out", y))


def encode(p, x):
    x = conv(p, "encoder.conv_in", x, padding=1)
    for level in range(3):
        x = residual(p, f"encoder.down.{level}.block.0", x)
        if level < 2:
            x = conv(p, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = group_norm_silu(p, "encoder.norm_out", middle(p, "encoder.mid", x))
    mean, logvar = conv(p, "quant_conv", conv(p, "encoder.conv_out", x, padding=1)).chunk(2, 1)
    return mean, torch.clamp(logvar, -30, 20)


def decode(p, z):
    x = middle(p, "decoder.mid", conv(p, "decoder.conv_in", conv(p, "post_quant_conv", z), padding=1))
    for level in (2, 1, 0):
        for block in range(2):
            x = residual(p, f"decoder.up.{level}.block.{block}", x)
        if level:
            x = conv(
                p, f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1
            )
    return conv(p, "decoder.conv_out", group_norm_silu(p, "decoder.norm_out", x), padding=1)


def layer_norm(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-6)


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def silu(x):
    return x * torch.sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sit(p, x_t, t, labels):
    """Velocity, and the tokens after block ALIGN."""
    patches = x_t.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(B, 16, 16)
    x = patches @ p["x_embedder.proj.weight"].reshape(WIDTH, 16).T + p["x_embedder.proj.bias"] + p["pos_embed"]
    frequencies = torch.exp(torch.arange(128, dtype=torch.float32) * -math.log(10000) / 128)
    angles = t[:, None] * frequencies[None]
    sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
    c = linear(p, "t_embedder.mlp.2", silu(linear(p, "t_embedder.mlp.0", sinusoids)))
    c = silu(c + p["y_embedder.embedding_table.weight"][labels])
    tokens = None
    for i in range(DEPTH):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(p, f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        qkv = linear(p, f"{b}.attn.qkv", layer_norm(x) * (1 + scale1) + shift1).view(B, 16, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.unbind(2)
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH // HEADS), -1)
        x = x + gate1 * linear(p, f"{b}.attn.proj", torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, 16, WIDTH))
        h = gelu_tanh(linear(p, f"{b}.mlp.fc1", layer_norm(x) * (1 + scale2) + shift2))
        x = x + gate2 * linear(p, f"{b}.mlp.fc2", h)
        if i + 1 == ALIGN:
            tokens = x
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out = linear(p, "final_layer.linear", layer_norm(x) * (1 + scale) + shift).view(B, 4, 4, 2, 2, 4)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(B, 4, 8, 8), tokens


def align(p, tokens, targets):
    h = silu(linear(p, "0.2", silu(linear(p, "0.0", tokens))))
    y = linear(p, "0.4", h)
    return -torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(y, targets)]).mean()


def vgg_features(p, x):
    x = (x - p["shift"]) / p["scale"]
    layers, taps = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], {2, 7, 14, 21, 28}
    for i in layers:
        if i in (5, 10, 17, 24):
            x = F.max_pool2d(x, 2)
        x = torch.relu(conv(p, f"features.{i}", x, padding=1))
        if i in taps:
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def lpips(p, a, b):
    # The published run passes 2x - 1 to LPIPS although the images are already in [-1, 1].
    pairs = zip(vgg_features(p, 2 * a - 1), vgg_features(p, 2 * b - 1))
    return sum(conv(p, f"linear.{i}", (u - v).square()).mean(dim=(2, 3)) for i, (u, v) in enumerate(pairs)).mean()


def discriminate(p, statistics, x):
    """Logits; batch norms use the batch and update their running statistics, as torch does."""
    x = F.leaky_relu(conv(p, "main.0", x, stride=2, padding=1), 0.2)
    for i, stride in ((2, 2), (5, 1)):
        x = conv(p, f"main.{i}", x, stride=stride, padding=1)
        mean, var, n = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False), x.numel() / x.shape[1]
        old_mean, old_var = statistics[f"main.{i + 1}.running_mean"], statistics[f"main.{i + 1}.running_var"]
        statistics[f"main.{i + 1}.running_mean"] = 0.9 * old_mean + 0.1 * mean.detach()
        statistics[f"main.{i + 1}.running_var"] = 0.9 * old_var + 0.1 * var.detach() * n / (n - 1)
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
        x = x * p[f"main.{i + 1}.weight"][:, None, None] + p[f"main.{i + 1}.bias"][:, None, None]
        x = F.leaky_relu(x, 0.2)
    return conv(p, "main.8", x, padding=1)


class Adam:
    """AdamW without weight decay on a dict of tensors, after clipping to norm 1."""

    def __init__(self):
        self.m, self.v, self.k = {}, {}, 0

    def step(self, params, loss, names):
        grads = dict(zip(names, torch.autograd.grad(loss, [params[n] for n in names])))
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        self.k += 1
        with torch.no_grad():
            for name, g in grads.items():
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
                self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g * g
                update = self.m[name] / (1 - 0.9**self.k)
                params[name] -= LR * update / ((self.v[name] / (1 - 0.999**self.k)).sqrt() + 1e-8)
        return norm


class Oracle:
    def __init__(self, m: Modules):
        def leaves(module):
            own = dict(module.named_parameters())
            return {k: v.detach().clone().requires_grad_(k in own) for k, v in module.state_dict().items()
                    if v.is_floating_point()}  # fmt: skip

        self.vae, self.gan, self.lpips = (
            leaves(m.tokenizer),
            leaves(m.discriminator.network),
            leaves(m.reconstruction["lpips"]),
        )
        self.lpips |= {k: getattr(m.reconstruction["lpips"], k).clone() for k in ("shift", "scale")}
        self.sit = leaves(m.denoiser) | {f"projector.{k}": v for k, v in leaves(m.heads).items()}
        self.bn_mean, self.bn_var = m.latent_norm.running_mean.clone(), m.latent_norm.running_var.clone()
        self.ema = {k: v.detach().clone() for k, v in self.sit.items()}
        self.ema_bn = self.bn_mean.clone(), self.bn_var.clone()
        self.adam = {name: Adam() for name in ("vae", "gan", "sit")}

    def trained(self, params):
        return [name for name, p in params.items() if p.requires_grad]

    def projector(self):
        return {k.removeprefix("projector."): v for k, v in self.sit.items() if k.startswith("projector.")}

    def step(self, batch, draws, targets):
        x, labels = batch.images, batch.condition.label
        t, noise, seen = draws["time"], draws["noise"], {}
        t_map = t[:, None, None, None]

        mean, logvar = encode(self.vae, x)
        z = mean + torch.exp(0.5 * logvar) * draws["posterior"]
        x_hat = decode(self.vae, z)
        seen["l1"] = (x - x_hat).abs().mean()
        seen["lpips"] = lpips(self.lpips, x, x_hat)
        seen["kl"] = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / B
        seen["gan"] = -discriminate(self.gan, self.gan, x_hat).mean()
        z_running = (z - self.bn_mean[:, None, None]) / torch.sqrt(self.bn_var[:, None, None] + 1e-4)
        _, tokens = sit(self.sit, (1 - t_map) * z_running + t_map * noise, t, labels)
        seen["tokenizer_align"] = align(self.projector(), tokens, targets)
        total = seen["l1"] + seen["lpips"] + 1e-6 * seen["kl"] + 0.1 * seen["gan"] + 1.5 * seen["tokenizer_align"]
        seen["norm_tokenizer"] = self.adam["vae"].step(self.vae, total, self.trained(self.vae))

        real = discriminate(self.gan, self.gan, x)
        fake = discriminate(self.gan, self.gan, x_hat.detach())
        seen["hinge"] = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        seen["norm_discriminator"] = self.adam["gan"].step(self.gan, seen["hinge"], self.trained(self.gan))

        z = z.detach()
        mean, var, n = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False), z.numel() / 4
        z_batch = (z - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-4)
        self.bn_mean = 0.9 * self.bn_mean + 0.1 * mean
        self.bn_var = 0.9 * self.bn_var + 0.1 * var * n / (n - 1)
        dropped = torch.where(draws["label"] < DROP, CLASSES, labels)
        velocity, tokens = sit(self.sit, (1 - t_map) * z_batch + t_map * noise, t, dropped)
        seen["velocity"] = (velocity - (noise - z_batch)).square().mean()
        seen["denoiser_align"] = align(self.projector(), tokens, targets)
        total = seen["velocity"] + 0.5 * seen["denoiser_align"]
        seen["norm_denoiser"] = self.adam["sit"].step(self.sit, total, self.trained(self.sit))

        for name, p in self.sit.items():
            self.ema[name] = EMA_DECAY * self.ema[name] + (1 - EMA_DECAY) * p.detach()
        self.ema_bn = tuple(
            EMA_DECAY * old + (1 - EMA_DECAY) * new for old, new in zip(self.ema_bn, (self.bn_mean, self.bn_var))
        )
        return {name: value.item() if torch.is_tensor(value) else value for name, value in seen.items()}


# -- the comparison ----------------------------------------------------------------------------------------------------


def project_step(m: Modules, accumulation: int = 1):
    groups = {
        name: ParameterGroup(name, {part: getattr(m, part) for part in parts}, AdamW, schedule=Schedule(LR))
        for name, parts in RepaE.trains.items()
    }
    ema = Ema({"denoiser": m.denoiser, "heads": m.heads, "latent_norm": m.latent_norm}, EMA_DECAY)
    step = Step(
        RepaE(), m, groups, ema=ema, accumulation=accumulation, autocast_dtype=None,
        device=torch.device("cpu"),
    )  # fmt: skip
    return step, ema


NAMES = {
    "l1": "tokenizer/l1",
    "lpips": "tokenizer/lpips",
    "kl": "tokenizer/kl",
    "gan": "tokenizer/gan",
    "tokenizer_align": "tokenizer/align",
    "hinge": "discriminator/hinge",
    "velocity": "denoiser/velocity",
    "denoiser_align": "denoiser/align",
    "norm_tokenizer": "grad_norm/tokenizer",
    "norm_discriminator": "grad_norm/discriminator",
    "norm_denoiser": "grad_norm/denoiser",
}


def assert_close(ours: dict, oracle: dict, what: str) -> None:
    for name, expected in oracle.items():
        difference = (ours[name].double() - expected.detach()).abs().max().item()
        assert difference <= 1e-9 * max(1e-2, expected.abs().max().item()), f"{what} {name}: {difference}"


def test_three_steps_equal_the_sequential_oracle(modules):
    oracle = Oracle(modules)
    step, ema = project_step(modules)
    recorded = json.loads(RECORDED.read_text())
    for k in range(STEPS):
        batch, draws, targets = inputs(k)
        modules.encoders["fixed"].targets = targets
        expected = oracle.step(batch, draws, targets)
        read = step(k, [(batch, draws)]).read()
        assert read["skipped_steps"] == 0
        for name, ours in NAMES.items():
            assert math.isclose(read[ours], expected[name], rel_tol=1e-9), f"step {k}: {name}"
            assert math.isclose(read[ours], recorded[k][name], rel_tol=1e-9), f"step {k}: {name} as recorded"

        heads = {f"projector.{name}": value for name, value in modules.heads.state_dict().items()}
        assert_close(modules.tokenizer.state_dict(), oracle.vae, f"step {k}: tokenizer")
        assert_close(modules.discriminator.network.state_dict(), oracle.gan, f"step {k}: discriminator")
        assert_close(modules.denoiser.state_dict() | heads, oracle.sit, f"step {k}: denoiser")
        norm = {"running_mean": oracle.bn_mean, "running_var": oracle.bn_var}
        assert_close(modules.latent_norm.state_dict(), norm, f"step {k}: latent norm")
        averaged = {f"projector.{name}": value for name, value in ema.modules["heads"].state_dict().items()}
        assert_close(ema.modules["denoiser"].state_dict() | averaged, oracle.ema, f"step {k}: EMA")
        norm = dict(zip(("running_mean", "running_var"), oracle.ema_bn))
        assert_close(ema.modules["latent_norm"].state_dict(), norm, f"step {k}: EMA of the latent norm")


def test_a_step_with_a_nonfinite_loss_changes_nothing(modules):
    step, ema = project_step(modules)
    batch, draws, modules.encoders["fixed"].targets = inputs(0)
    step(0, [(batch, draws)])
    watched = {**modules.named(), **{f"ema.{name}": m for name, m in ema.modules.items()}}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in watched.items()}
    state = [{k: v.clone() for k, v in s.items()} for g in step.groups.values() for s in g.optimizer.state.values()]

    batch.images[0, 0, 0, 0] = math.nan
    assert step(1, [(batch, draws)]).read()["skipped_steps"] == 1
    for name, module in watched.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[name][key]), f"{name}.{key} changed"
    after = [s for g in step.groups.values() for s in g.optimizer.state.values()]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after, state) for k in b)
