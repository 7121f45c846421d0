"""The discriminator of RAE: against the publication's arithmetic written by hand, in runs, and its random numbers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components import registry
from components.contracts import LatentShape, Modules
from components.diffusion.losses import discriminate, reconstruction
from components.diffusion.random_numbers import draw, of_step
from components.distributed.parallel import World
from components.files.weights import WeightsError
from components.registry import PluginError
from plugins.losses.dino_gan import DinoGAN, SpectralConv1d, augmented
from plugins.losses.patchgan import PatchGAN
from plugins.recipes.tokenizer import TokenizerOnly
from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import compiled_by_aot_eager
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

registry.discover("plugins")
SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2, "act_layer": "gelu_tanh"}
TINY = {"encoder": "tiny_vit", "grid": 8, "blocks": [0, 2]}


def small(**options) -> DinoGAN:
    """A small DINO on 4 x 4 patches of 8 pixels, in fp64, with all weights at random."""
    torch.manual_seed(0)
    made = {"pretrained": False, "options": SMALL}
    loss = DinoGAN(**{"grid": 4, "blocks": [0, 2], "encoder_options": made} | options).double().train()
    for p in loss.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return loss


def images(count: int = 3, side: int = 40) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, x_hat = (torch.rand(count, 3, side, side, generator=g, dtype=torch.float64) * 2.4 - 1.2 for _ in range(2))
    return x.clamp(-1, 1), x_hat, {"augmentation": torch.rand(count, 3, 5, generator=g)}


def augmented_by_hand(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    found = []
    for image, (down, across, brightness, saturation, contrast) in zip(x, u.tolist()):
        side = image.shape[-1]
        most = round(side / 8)
        dy, dx = (math.floor(n * (2 * most + 1)) - most for n in (down, across))
        room = F.pad(image, [most] * 4)
        image = room[:, most + dy : most + dy + side, most + dx : most + dx + side]
        image = image + brightness - 0.5
        image = torch.lerp(image.mean(0, keepdim=True).expand_as(image), image, 2 * saturation)
        found.append(torch.lerp(image.mean().expand_as(image), image, contrast + 0.5))
    return torch.stack(found)


class Published(nn.Module):
    """The published discriminator on PyTorch's own spectral norm, with the weights and vectors of ours."""

    def __init__(self, ours: DinoGAN) -> None:
        super().__init__()
        self.vit, self.blocks = ours.encoder.model, ours.blocks
        self.heads = nn.ModuleList()
        for head in ours.heads.heads:
            convolutions = nn.ModuleList()
            for ours_ in (head.token, head.around, head.logit):
                k = ours_.kernel_size[0]
                conv = nn.Conv1d(
                    ours_.in_channels, ours_.out_channels, k, padding=k // 2, padding_mode="circular"
                ).double()
                conv.load_state_dict({"weight": ours_.weight, "bias": ours_.bias})
                nn.utils.spectral_norm(conv)
                conv.weight_u.copy_(ours_.u)
                conv.weight_v.copy_(ours_.v)
                convolutions.append(conv)
            self.heads.append(convolutions)
        self.norms = [[(n.weight, n.bias) for n in (head.token_norm, head.around_norm)] for head in ours.heads.heads]

    def tokens(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of the last block, then of each chosen block, without the final norm; keys have no bias."""
        x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        vit = self.vit
        x = vit.patch_embed.proj(((x + 1) / 2 - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
        found = []
        for block in vit.blocks:
            qkv = block.attn.qkv.bias.clone()
            qkv[16:32] = 0
            q, k, v = (
                F.linear(block.norm1(x), block.attn.qkv.weight, qkv).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            )
            y = ((q @ k.mT) / math.sqrt(8)).softmax(-1) @ v
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)), approximate="tanh"))
            found.append(x[:, 1:])
        return [found[-1], *(found[index] for index in self.blocks)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = []
        for (first, second, last), norms, tokens in zip(self.heads, self.norms, self.tokens(x)):
            h, y = tokens.transpose(1, 2), None
            for conv, (weight, bias) in zip((first, second), norms):
                y = conv(h)
                y = (y - y.mean(2, keepdim=True)) / torch.sqrt(y.var(2, unbiased=False, keepdim=True) + 1e-6)
                y = F.leaky_relu(y * weight[:, None] + bias[:, None], 0.2)
                h = y if conv is first else (y + h) / math.sqrt(2)
            logits.append(last(h).flatten(1))
        return torch.cat(logits, 1)


def test_against_the_published_arithmetic():
    """Values and gradients of two steps: the generator in eval mode, the discriminator on fake, then real images."""
    ours = small()
    theirs = Published(ours)
    x, x_hat, random = images()
    weights = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert weights and not any(name.startswith("encoder.") for name in weights)
    for step in range(2):
        u = random["augmentation"] * 0.9 + 0.1 * step
        moving, other = x_hat.clone().requires_grad_(), x_hat.clone().requires_grad_()
        value = ours.generator(moving, step, random={"augmentation": u})
        theirs.eval()
        expected = -theirs(augmented_by_hand(other, u[:, 0])).mean()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        (found,) = torch.autograd.grad(value, moving)
        torch.testing.assert_close(found, torch.autograd.grad(expected, other)[0], rtol=1e-7, atol=1e-12)

        terms, report = ours.discriminator(x, x_hat, step, random={"augmentation": u})
        theirs.train()
        rounded = torch.round((x_hat.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1
        fake, real = (theirs(augmented_by_hand(images, u[:, i])) for i, images in ((1, rounded), (2, x)))
        expected = 0.5 * (F.relu(1 + fake).mean() + F.relu(1 - real).mean())
        torch.testing.assert_close(terms["hinge"], expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(report["logits_real"], real.mean().detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(report["logits_fake"], fake.mean().detach(), rtol=1e-9, atol=1e-12)
        pairs = [
            (a.weight, b.weight_orig)
            for head, convs in zip(ours.heads.heads, theirs.heads)
            for a, b in zip((head.token, head.around, head.logit), convs)
        ]
        mine = torch.autograd.grad(terms["hinge"], [a for a, _ in pairs])
        for a, b in zip(mine, torch.autograd.grad(expected, [b for _, b in pairs])):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_augmentation():
    x, _, random = images()
    same = torch.tensor([[0.5] * 5] * 3)
    torch.testing.assert_close(augmented(x, same), x, rtol=1e-12, atol=1e-12)
    for edge in (0.0, 1 - 2**-24):  # the largest number that torch.rand returns
        u = torch.full((3, 5), edge)
        torch.testing.assert_close(augmented(x, u), augmented_by_hand(x, u), rtol=1e-6, atol=1e-6)
    one = augmented(x[1:2], random["augmentation"][1:2, 0])
    torch.testing.assert_close(augmented(x, random["augmentation"][:, 0])[1:2], one, rtol=1e-12, atol=1e-12)


def test_power_iteration_finds_the_largest_singular_value():
    torch.manual_seed(0)
    layer, x = SpectralConv1d(6, 8, 3).double(), torch.randn(1, 6, 5, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
    layer.bias.data.zero_()
    before = layer.u.clone()
    layer(x, iterate=False)
    assert torch.equal(layer.u, before)
    for _ in range(200):
        y = layer(x, iterate=True)
    torch.testing.assert_close(y, nn.functional.conv1d(F.pad(x, (1, 1), mode="circular"), layer.weight / largest))


def test_nothing_runs_before_the_start():
    loss = small(start_step=5, warmup_steps=2)
    x, x_hat, random = images()
    x_hat.requires_grad_()
    assert loss.generator(x_hat, 4) == 0 and not loss.generator(x_hat, 4).requires_grad
    terms, report = loss.discriminator(x, x_hat.detach(), 2)
    assert terms["hinge"] == 0 and not terms["hinge"].requires_grad and not report
    assert loss.discriminator(x, x_hat.detach(), 3, random=random)[0]["hinge"].requires_grad
    assert loss.generator(x_hat, 5, random=random).requires_grad
    assert not small(augment=False).random_numbers
    assert small(augment=False).generator(x_hat, 0).requires_grad


def test_random_numbers_of_a_step():
    """Those of the loss join the recipe's, which stay what they are; each image has its own on any number of ranks."""
    recipe, latent = TokenizerOnly(), LatentShape(4, 8, 8)
    m = Modules(discriminator=PatchGAN(channels=8))
    assert of_step(recipe, m, latent) == recipe.random_numbers(m, latent)
    m = Modules(discriminator=DinoGAN(**TINY))
    declared = of_step(recipe, m, latent)
    assert declared.keys() == {"posterior", "discriminator.augmentation"}
    whole = draw(3, 7, range(8), 8, declared)
    assert torch.equal(whole["posterior"], draw(3, 7, range(8), 8, recipe.random_numbers(m, latent))["posterior"])
    part = draw(3, 7, range(2, 6), 8, declared)["discriminator.augmentation"]
    assert part.shape == (4, 3, 5) and torch.equal(part, whole["discriminator.augmentation"][2:6])


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_recipe_that_passes_no_random_numbers_on(adaptive):
    m, (batch, _) = toys.modules(), toys.batch()
    m.discriminator = DinoGAN(**TINY).double()
    posterior = m.tokenizer.encode(batch.images)
    x_hat = m.tokenizer.decode(posterior.mean)
    m.last_layer = object() if adaptive else None
    message = r"loss 'dino_gan' needs random numbers, .*reconstruction\(..., step, random\)"
    with pytest.raises(PluginError, match=message):
        reconstruction(m, batch.images, x_hat, posterior, 0)
    with pytest.raises(PluginError, match=message):
        discriminate(m, batch.images, x_hat, 0, lambda *_, **__: None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"warmup_steps": 1}, "warmup_steps = 1; expected 0 to start_step = 0"),
        ({"start_step": -1}, "start_step = -1; expected at least 0"),
        ({"grid": 1}, "grid = 1; expected at least 2"),
        ({"encoder": "tiny_vt"}, "losses.dino_gan.encoder: no encoder is called 'tiny_vt'"),
        ({"encoder": "tiny_vit", "encoder_options": {"sise": 1}}, "losses.dino_gan.encoder_options.sise"),
        ({"encoder": "tiny_vit"}, r"blocks = \[2, 5, 8, 11\]; expected .* 'tiny_vit' has blocks 0 to 2"),
        ({"encoder": "tiny_vit", "blocks": [1, 1]}, r"blocks = \[1, 1\]; expected ascending"),
        ({"encoder": "tiny_vit", "blocks": []}, r"blocks = \[\]; expected ascending"),
        (
            {"encoder": "timm", "encoder_options": {"model": "resnet18", "pretrained": False}, "blocks": [0]},
            "'resnet18' returns no tokens of its blocks",
        ),
    ],
    ids=str,
)
def test_errors(options, says):
    with pytest.raises(ValueError, match=says):
        DinoGAN(**options)


def test_missing_weights_name_the_option(tmp_path):
    made = {"options": SMALL}
    loss = DinoGAN(grid=4, blocks=[0], encoder_options=made, checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match=r"loss dino_gan: .*none.pth"):
        loss.load_weights()
    state = {name: torch.zeros_like(t) for name, t in loss.encoder.model.state_dict().items()}
    torch.save(state, tmp_path / "dino.pth")
    loss = DinoGAN(grid=4, blocks=[0], encoder_options=made, checkpoint=str(tmp_path / "dino.pth"))
    loss.load_weights()
    assert not any(p.any() for p in loss.encoder.model.parameters())


# Runs


@pytest.fixture
def toml(tmp_path):
    text = toys.TOML.replace('[recipe]\nname = "repae"', '[recipe]\nname = "tokenizer"')
    table = '[losses.dino_gan]\nencoder = "tiny_vit"\ngrid = 8\nblocks = [0, 2]\nstart_step = 2\nwarmup_steps = 1\n'
    assert "[losses.patchgan]\nchannels = 8\nlayers = 2\n" in text
    path = tmp_path / "toy.toml"
    path.write_text(text.replace("[losses.patchgan]\nchannels = 8\nlayers = 2\n", table))
    return str(path)


def train(rank: int, world: int, toml: str, folder: str, options: list[str]) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    trainer = Trainer(config.load(toml, [f"--run.dir={folder}", *STEPS, *options]), World(rank, world))
    trainer.run()
    discriminator = trainer.parts.modules.discriminator
    return {name: t.clone() for name, t in discriminator.named_buffers() if name.endswith((".u", ".v"))}


STEPS = ["--training.precision=fp64", "--training.steps=4", "--run.checkpoint_every=0", "--optimizer.lr=1e-3"]


def numbers(folder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("tokenizer/", "discri", "grad_norm/"))} for line in lines]


def assert_same(one, other) -> None:
    assert len(one) == len(other) == 4
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_are_one(toml, tmp_path, strategy):
    vectors, other = run_ranks(train, 2, toml, str(tmp_path / "two"), [f"--parallel.strategy={strategy}"])
    alone = train(0, 1, toml, str(tmp_path / "one"), [])
    one = numbers(tmp_path / "one")
    assert one[0]["discriminator/hinge"] == 0 < one[1]["discriminator/hinge"]
    assert one[1]["tokenizer/gan"] == 0 < one[2]["tokenizer/gan_weight"] and one[2]["tokenizer/gan"] != 0
    assert_same(one, numbers(tmp_path / "two"))
    for name, vector in alone.items():
        torch.testing.assert_close(vectors[name], vector, rtol=1e-8, atol=1e-10)
        assert torch.equal(vectors[name], other[name])


@pytest.mark.long
def test_resumed_is_uninterrupted(toml, tmp_path):
    options = ["--run.checkpoint_every=3"]
    vectors = train(0, 1, toml, str(tmp_path / "whole"), options)
    train(0, 1, toml, str(tmp_path / "run"), [*options, "--training.steps=3"])
    resumed = train(0, 1, toml, str(tmp_path / "run"), options)
    assert numbers(tmp_path / "whole")[-1] == numbers(tmp_path / "run")[-1]
    assert vectors.keys() == resumed.keys() and all(torch.equal(vectors[name], resumed[name]) for name in vectors)


@pytest.mark.long
def test_compiled_code_computes_the_same(toml, tmp_path):
    small_ = ["--training.resolution=16", "--tokenizer.multipliers=[1,2]"]
    train(0, 1, toml, str(tmp_path / "eager"), small_)
    with compiled_by_aot_eager():
        train(0, 1, toml, str(tmp_path / "compiled"), [*small_, "--training.compile=true"])
    assert_same(numbers(tmp_path / "eager"), numbers(tmp_path / "compiled"))


def test_the_frozen_network_stays_as_it_is(toml, tmp_path):
    trainer = Trainer(config.load(toml, [f"--run.dir={tmp_path / 'run'}", *STEPS]), World())
    encoder = trainer.parts.modules.discriminator.encoder
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    heads = {name: t.clone() for name, t in trainer.parts.modules.discriminator.heads.state_dict().items()}
    assert not any(name.startswith("discriminator.encoder") for name in trainer.groups["discriminator"].names)
    trainer.run()
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items()) and not encoder.training
    now = trainer.parts.modules.discriminator.heads.state_dict()
    moved = [name for name in heads if name.endswith((".weight", ".v"))]
    assert moved and not any(torch.equal(now[name], heads[name]) for name in moved)


def test_refused_without_a_last_layer(toml, monkeypatch):
    from plugins.tokenizers.autoencoder_kl import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "last_layer", lambda self: None)
    with pytest.raises(ConfigError, match=r"\[losses.dino_gan\] adaptive = true needs"):
        assemble.check(config.load(toml), 1)
