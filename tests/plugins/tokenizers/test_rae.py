"""Representation autoencoders: frozen tokens as latents, the published decoder, and its training recipe."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from components import registry
from components.contracts import Batch, Condition, LatentShape, Modules
from components.diffusion.random_numbers import draw
from components.distributed.parallel import World
from components.files.fingerprint import fingerprint
from components.files.weights import WeightsError
from plugins.losses.reconstruction import L1
from plugins.recipes.rae_decoder import RaeDecoder
from plugins.tokenizers.rae import RAE
from tests.support import toys
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer
from trainer.run.pictures import fixed_images, reconstruct

registry.discover("plugins")
TINY = {"encoder": "tiny_vit", "resolution": 32, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
TABLE = "\n".join(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in TINY.items())
HEAD, REST = toys.TOML.split("[tokenizer]\n")
TOML = (HEAD + f'[tokenizer]\nname = "rae"\n{TABLE}\n\n' + REST[REST.index("[denoiser]") :]).replace(
    "[losses.kl]\n", ""
)


def made(seed: int = 0, **options) -> RAE:
    """An RAE with a nonzero class token, which is initialized to zero."""
    torch.manual_seed(seed)
    rae = RAE(**TINY | options)
    torch.nn.init.normal_(rae.decoder.cls_token)
    return rae


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("rae") / "toy.toml"
    path.write_text(TOML)
    return path


# Latents


def test_latents_are_tokens_normalized_without_the_last_norm():
    """Reimplements a timm model's last block: the last norm and its weights must have no effect."""
    timm = {"model": "vit_tiny_patch16_224", "pretrained": False}
    rae = RAE(encoder="timm", encoder_options=timm, resolution=64, width=16, depth=1, heads=2).double()
    seen, model = [], rae.encoder.model
    torch.nn.init.normal_(model.norm.weight)
    model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    z = rae.encode(x).mean
    tokens = seen[0][:, 1:]
    centered = tokens - tokens.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert z.shape == (2, 192, 4, 4) and rae.factor == 16 and rae.channels == 192
    for row in range(4):
        for column in range(4):
            assert torch.allclose(z[:, :, row, column], expected[:, 4 * row + column], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "blocks", "scale", "mean"),
    [
        ({"layers": 3}, [9, 10, 11], 1 / 3, 0.0),
        ({"layers": 3, "combine": "sum"}, [9, 10, 11], 1.0, 0.0),
        ({"layers": [2, 7], "token_mean": True}, [2, 7], 1 / 2, 1.0),
    ],
)
def test_latents_combine_several_layers(options, blocks, scale, mean):
    """Against hooks on the model's own blocks, each token normalized by hand."""
    timm = {"model": "vit_tiny_patch16_224", "pretrained": False}
    rae = RAE(encoder="timm", encoder_options=timm, resolution=48, width=16, depth=1, heads=2, **options).double()
    seen = {}
    for index, block in enumerate(rae.encoder.model.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out[:, 1:]}))
    torch.nn.init.normal_(rae.encoder.model.norm.weight)
    z = rae.encode(torch.rand(2, 3, 48, 48, dtype=torch.float64) * 2 - 1).mean
    assert max(seen) == blocks[-1], "later blocks must not run"
    expected = torch.zeros(2, 9, 192, dtype=torch.float64)
    for index in blocks:
        centered = seen[index] - seen[index].mean(-1, keepdim=True)
        last = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected += scale * last
    expected += mean * last.sum(1, keepdim=True) / 9
    assert torch.allclose(z.flatten(2).transpose(1, 2), expected, atol=1e-12, rtol=0)


def test_layers_are_those_of_the_shipped_encoder_and_part_of_the_fingerprint():
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    one, last, all_three = made().double(), made(layers=[2]).double(), made(layers=3).double()
    assert torch.allclose(last.encoder.norm(last.encoder.block_tokens(x, [2])[0]), last.encoder(x), atol=1e-12)
    coarse = type(one.encoder)(32, 4).double()
    assert coarse.block_tokens(x, [0, 2])[1].shape == (2, 16, 96)
    for module in (last, all_three):
        assert module.encode(x).mean.shape == one.encode(x).mean.shape
        module.load_state_dict(one.state_dict())  # layers add no weights
    assert len({fingerprint(module) for module in (one, last, all_three)}) == 3


def test_the_encoder_never_learns_and_the_decoder_does():
    rae = made().train()
    rae.decode(rae.encode(torch.rand(1, 3, 32, 32)).mean).square().mean().backward()
    assert not rae.encoder.training and rae.decoder.training
    for name, p in rae.named_parameters():
        assert p.requires_grad == name.startswith("decoder.") == (p.grad is not None), name


# The decoder


def published_decoder(state, z, heads: int, patch: int):
    """The published decoder's arithmetic with its own names; tokens z (B, N, D)."""
    norm, batch, n = partial(F.layer_norm, eps=1e-12), len(z), z.shape[1]

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = torch.cat([state["trainable_cls_token"].expand(batch, -1, -1), linear("decoder_embed", z)], 1)
    x = x + state["decoder_pos_embed"]
    for layer in range(sum(key.endswith("layernorm_before.weight") for key in state)):
        at = f"decoder_layers.{layer}."
        width = x.shape[-1]
        h = norm(x, (width,), state[at + "layernorm_before.weight"], state[at + "layernorm_before.bias"])
        q, k, v = (
            linear(f"{at}attention.attention.{name}", h).view(batch, n + 1, heads, width // heads)
            for name in ("query", "key", "value")
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(width // heads)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, n + 1, width)
        x = linear(at + "attention.output.dense", mixed) + x
        h = norm(x, (width,), state[at + "layernorm_after.weight"], state[at + "layernorm_after.bias"])
        h = linear(at + "intermediate.dense", h)
        x = linear(at + "output.dense", 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))) + x
    x = norm(x, x.shape[-1:], state["decoder_norm.weight"], state["decoder_norm.bias"])
    side = math.isqrt(n)
    pixels = linear("decoder_pred", x)[:, 1:].view(batch, side, side, patch, patch, 3)
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(batch, 3, side * patch, side * patch)


def positions(width: int, side: int) -> torch.Tensor:
    """Interleaved sines and cosines of columns, then of rows; zero for the class token."""
    table = torch.zeros(1, 1 + side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                for half, place in ((0, column), (1, row)):
                    angle = place / 10_000 ** (i / quarter)
                    table[0, 1 + row * side + column, half * 2 * quarter + i] = math.sin(angle)
                    table[0, 1 + row * side + column, (half * 2 + 1) * quarter + i] = math.cos(angle)
    return table


def test_a_published_decoder_is_read_and_decodes_the_same(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    width, channels, patch = 16, 96, 4
    shapes = {"decoder_embed": (width, channels), "decoder_pred": (3 * patch**2, width)}
    for layer in range(2):
        at = f"decoder_layers.{layer}."
        shapes |= {f"{at}attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
        shapes |= {f"{at}attention.output.dense": (width, width), f"{at}intermediate.dense": (4 * width, width)}
        shapes |= {f"{at}output.dense": (width, 4 * width)}
        shapes |= {f"{at}layernorm_before": (width,), f"{at}layernorm_after": (width,)}
    shapes["decoder_norm"] = (width,)
    state = {"decoder_pos_embed": positions(width, 8), "trainable_cls_token": torch.randn(1, 1, width, generator=g)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = 0.3 * torch.randn(shape, generator=g)
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=g)
    save_file({key: value.float() for key, value in state.items()}, tmp_path / "decoder.safetensors")
    rae = RAE(**TINY, checkpoint=str(tmp_path / "decoder.safetensors"))
    rae.load_weights()
    state = {key: value.double() for key, value in state.items()}
    z = torch.randn(2, channels, 8, 8, generator=g, dtype=torch.float64)
    expected = published_decoder(state, z.flatten(2).transpose(1, 2), heads=2, patch=patch)
    with torch.no_grad():
        found = rae.double().decode(z)
        # Position embeddings are computed in fp32.
        assert torch.allclose(found, expected, atol=1e-5)
        stats = torch.full((1, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.2)
        monkeypatch.setattr(type(rae.encoder), "pixel_stats", stats)
        assert torch.allclose(rae.decode(z), (expected * 0.2 + 0.4) * 2 - 1, atol=1e-5)
        unit = RAE(**TINY, output="unit").double()
        unit.load_state_dict(rae.state_dict())
        assert torch.allclose(unit.decode(z), expected * 2 - 1, atol=1e-5)


def test_presets_are_the_published_sizes():
    """Parameters counted by hand: embedding, class token, blocks, norm, prediction."""
    for name, (width, depth, hidden) in {"B": (768, 12, 3072), "L": (1024, 24, 4096), "XL": (1152, 28, 4096)}.items():
        with torch.device("meta"):
            decoder = RAE(encoder="tiny_vit", decoder=name).decoder
        block = 4 * (width + 1) * width + 2 * 2 * width + (width + 1) * hidden + (hidden + 1) * width
        expected = 97 * width + width + depth * block + 2 * width + (width + 1) * 768
        assert sum(p.numel() for p in decoder.parameters()) == expected


def test_weights_come_back_whole_or_as_a_decoder_alone(tmp_path):
    saved = made(1)
    torch.nn.init.normal_(saved.encoder.head.weight)
    save_file(saved.state_dict(), tmp_path / "tokenizer.safetensors")
    save_file(saved.decoder.state_dict(), tmp_path / "decoder.safetensors")
    whole, part = (
        made(checkpoint=str(tmp_path / "tokenizer.safetensors")),
        made(checkpoint=str(tmp_path / "decoder.safetensors")),
    )
    whole.load_weights()
    part.load_weights()
    for key, value in saved.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value)
        if key.startswith("decoder."):
            assert torch.equal(part.state_dict()[key], value)
    assert part.encoder.head.weight.std() < 0.5, "the encoder's are its own"
    with pytest.raises(
        WeightsError, match=r"rae: .*decoder.safetensors' does not match the module:\n  38 with a different shape"
    ):
        made(checkpoint=str(tmp_path / "decoder.safetensors"), width=32).load_weights()


def test_missing_encoder_weights_name_the_tokenizers_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.device("meta"):
        rae = RAE(encoder="dinov2", encoder_options={"size": "s", "checkpoint": str(tmp_path / "none.pth")})
    with pytest.raises(WeightsError, match=r"\[tokenizer\] rae: .*none.pth"):
        rae.load_weights()


# The recipe


def test_noise_is_half_normal_and_is_declared():
    tokenizer, seen = made().double(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda z: seen.append(z) or decode(z)
    m = Modules(tokenizer=tokenizer, reconstruction={"l1": L1()})
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    numbers = draw(0, 0, range(4), 4, RaeDecoder().random_numbers(m, LatentShape(96, 8, 8)))
    z = tokenizer.encode(x).mean
    for tau in (0.0, 0.5):
        RaeDecoder(noise_tau=tau).step(m, Batch(x, Condition(torch.zeros(4))), numbers, lambda *_, **__: None, 0)
        # P(|N(0, 1)| < s) = erf(s / sqrt 2) = u
        sigma = ((seen[-1] - z) / numbers["noise"]).flatten(1).double()
        u = torch.erf(sigma / max(tau, 1e-9) / math.sqrt(2)) if tau else sigma
        expected = numbers["sigma"].double()[:, None] if tau else torch.zeros(4, 1, dtype=torch.float64)
        assert torch.allclose(u.median(1).values[:, None], expected, atol=1e-5)


@pytest.mark.long
def test_training_raises_psnr_and_leaves_the_encoder(toml, tmp_path):
    options = ["--recipe.name=rae_decoder", "--training.steps=40", f"--run.dir={tmp_path}", "--run.checkpoint_every=0",
               "--recipe.noise_tau=0.2", "--optimizer.lr=3e-3", "--losses.patchgan.start_step=38",
               "--tokenizer.width=64", "--run.log_every=40"]  # fmt: skip
    trainer = Trainer(config.load(str(toml), options), World())
    images, tokenizer = fixed_images(trainer.parts, torch.device("cpu")), trainer.parts.modules.tokenizer
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}

    def psnr() -> float:
        error = (reconstruct(trainer.parts, trainer.ema, images)[1] - images).square().mean()
        return (10 * torch.log10(4 / error)).item()

    start = psnr()
    trainer.run()
    end = psnr()
    assert end > start + 3, (start, end)
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("encoder."), key
    # The whole tokenizer is saved, so the run resumes where it was.
    again = Trainer(config.load(str(toml), [*options, "--training.steps=41"]), World())
    again.run()
    assert again.step == 41


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--recipe.name=repae"], ["recipe.name = 'repae'", "that of 'rae' is frozen", "rae_decoder"]),
        (["--recipe.name=tokenizer"], ["recipe.name = 'tokenizer'", "'rae'", "rae_decoder"]),
        (["--recipe.name=rae_decoder", "--training.resolution=64"],
         ["tokenizer.resolution = 32, but training.resolution = 64"]),
        (["--recipe.name=rae_decoder", "--tokenizer.patch_size=5"], ["tokenizer.resolution = 32 is not a multiple of"]),
        (["--recipe.name=rae_decoder", "--tokenizer.encoder=tiny_vt"],
         ["tokenizer.encoder: no encoder is called 'tiny_vt'", "did you mean 'tiny_vit'"]),
        (["--recipe.name=rae_decoder", "--tokenizer.encoder_options={sise = 3}"],
         ["tokenizer.encoder_options.sise", "options of encoder 'tiny_vit': checkpoint"]),
        (["--recipe.name=rae_decoder", "--tokenizer.layers=4"],
         ["tokenizer.layers = 4: expected 1 to 3, the blocks of encoder 'tiny_vit'"]),
        (["--recipe.name=rae_decoder", "--tokenizer.layers=[2, 1]"],
         ["tokenizer.layers = [2, 1]: expected ascending blocks of encoder 'tiny_vit', from 0 to 2"]),
        (["--recipe.name=rae_decoder", "--tokenizer.token_mean=true"], ["token_mean = true needs several"]),
        (["--recipe.name=rae_decoder", "--tokenizer.encoder=timm", "--tokenizer.layers=2",
          "--tokenizer.encoder_options={model = 'resnet18', pretrained = false}"],
         ["tokenizer.layers = 2: encoder 'timm' returns one layer; set it to 1"]),
        (["--recipe.name=rae_decoder", "--tokenizer.heads=3"], ["tokenizer.width = 16", "tokenizer.heads = 3"]),
        (["--recipe.name=rae_decoder", "--recipe.noise_tau=-1.0"], ["recipe.noise_tau = -1.0"]),
    ],
    ids=lambda value: value[-1] if value[-1].startswith("--") else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(toml, options, says):
    with pytest.raises(ConfigError) as refusal:
        assemble.check(config.load(str(toml), options), 1)
    for text in says:
        assert text in str(refusal.value)


def test_its_recipe_refuses_a_tokenizer_that_learns_whole(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    with pytest.raises(ConfigError, match=r"'rae_decoder' trains only the .*'autoencoder_kl' is trainable.*\(rae\)"):
        assemble.check(config.load(str(tmp_path / "toy.toml"), ["--recipe.name=rae_decoder"]), 1)


def test_a_denoiser_trains_on_its_latents(toml):
    parts = assemble.check(config.load(str(toml), ["--recipe.name=repa"]), 1)
    assert parts.latent == (96, 8, 8) and parts.modules.denoiser is not None
