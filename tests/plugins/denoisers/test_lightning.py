"""LightningDiT and DiT-DH: arithmetic, parameter counts and state-dict keys of the published networks, and training.

The formulas are reimplemented here in float64 from the papers and the structure of the published code: rotations as
complex products, attention head by head.
"""

import math

import pytest
import torch

from components.contracts import Condition, Denoiser, LatentShape
from components.distributed.materialize import WholeTensorRandom, materialize
from components.distributed.parallel import Sharding, World, compile_units, make_mesh, shard
from components.nn.lightningdit import LightningBlock, RMSNorm, Rotary, rotate
from components.registry import discover
from plugins.denoisers.ditdh import DiTDH, FourierEmbedding
from plugins.denoisers.lightningdit import LightningDiT
from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import finished
from trainer import config
from trainer.run.loop import Trainer

discover("plugins")
LATENT, CLASSES = LatentShape(3, 6, 6), 5
SMALL = {"width": 24, "depth": 3, "heads": 2, "align_depth": 2, "patch_size": 2}
HEAD = {"head_width": 32, "head_heads": 4}


def lightningdit(**options) -> LightningDiT:
    return LightningDiT(LATENT, CLASSES, **SMALL | options)


def ditdh(**options) -> DiTDH:
    return DiTDH(LATENT, CLASSES, **SMALL | HEAD | options)


MAKERS = {"lightningdit": lightningdit, "ditdh": ditdh}


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Randomize all weights, so that no zero hides an error."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*module.parameters(), *(b for key, b in module.named_buffers() if key.endswith(".W"))):
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return module.double()


def inputs(size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(size, *LATENT, generator=g, dtype=torch.float64)
    return x, torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)[:size], torch.tensor([0, 3, 4, 5])[:size]


class Formulas:
    """The networks as functions of their state dict, in float64."""

    def __init__(self, state: dict, grid: int, patch: int) -> None:
        self.s, self.grid, self.patch = state, grid, patch

    def linear(self, x, name):
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def rms(self, x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * self.s[f"{name}.weight"]

    @staticmethod
    def silu(x):
        return x / (1 + torch.exp(-x))

    def patches(self, x, name):
        """(B, C, h, w) -> one row per patch, each a product with the flattened kernel."""
        p, rows = self.patch, []
        kernel = self.s[f"{name}.proj.weight"].flatten(1)
        for i in range(self.grid):
            for j in range(self.grid):
                part = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1)
                rows.append(part @ kernel.T + self.s[f"{name}.proj.bias"])
        return torch.stack(rows, dim=1)

    def positions(self, width):
        """First half for columns, second half for rows, each with sines before cosines."""
        rows = []
        for i in range(self.grid):
            for j in range(self.grid):
                row = []
                for place in (j, i):
                    angles = [place / 10_000 ** (k / (width / 4)) for k in range(width // 4)]
                    row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(row)
        return torch.tensor(rows, dtype=torch.float32).double()

    def turn(self, x):
        """(B, N, d): rotate pairs of features as complex numbers, times exp(i angle)."""
        d = x.shape[-1]
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        frequencies = [10_000 ** (-4 * k / d) for k in range(d // 4)]
        places = [(i, j) for i in range(self.grid) for j in range(self.grid)]
        angles = torch.tensor([[p * f for p in place for f in frequencies] for place in places], dtype=torch.float64)
        # The published tables are in float32.
        factor = torch.complex(angles.cos().float().double(), angles.sin().float().double())
        return torch.view_as_real(turned * factor).flatten(-2)

    def attention(self, x, name, heads):
        q, k, v = self.linear(x, f"{name}.qkv").chunk(3, dim=-1)
        d, found = q.shape[-1] // heads, []
        for h in range(heads):
            qh, kh, vh = (part[..., h * d : (h + 1) * d] for part in (q, k, v))
            if f"{name}.q_norm.weight" in self.s:
                qh, kh = self.rms(qh, f"{name}.q_norm"), self.rms(kh, f"{name}.k_norm")
            scores = self.turn(qh) @ self.turn(kh).transpose(-2, -1) / math.sqrt(d)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            found.append(weights / weights.sum(-1, keepdim=True) @ vh)
        return self.linear(torch.cat(found, dim=-1), f"{name}.proj")

    def block(self, x, c, name, heads):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(self.silu(c), f"{name}.adaLN_modulation.1").chunk(
            6, -1
        )
        x = x + gate1 * self.attention(self.rms(x, f"{name}.norm1") * (1 + scale1) + shift1, f"{name}.attn", heads)
        a, b = self.linear(self.rms(x, f"{name}.norm2") * (1 + scale2) + shift2, f"{name}.mlp.w12").chunk(2, -1)
        return x + gate2 * self.linear(self.silu(a) * b, f"{name}.mlp.w3")

    def final(self, x, c, channels):
        shift, scale = self.linear(self.silu(c), "final_layer.adaLN_modulation.1").chunk(2, -1)
        x = self.linear(self.rms(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
        p, out = self.patch, torch.empty(len(x), channels, self.grid * self.patch, self.grid * self.patch).double()
        for n in range(x.shape[1]):
            i, j = divmod(n, self.grid)
            out[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = x[:, n].view(-1, p, p, channels).permute(0, 3, 1, 2)
        return out

    def mlp(self, x):
        return self.linear(self.silu(self.linear(x, "t_embedder.mlp.0")), "t_embedder.mlp.2")

    def lightningdit(self, x, t, labels, heads, depth):
        # The exponents are float32 in the published code, too.
        angles = t[:, None] * torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10_000)) / 128).double()
        c = self.mlp(torch.cat([angles.cos(), angles.sin()], -1)) + self.s["y_embedder.embedding_table.weight"][labels]
        h = self.patches(x, "x_embedder")
        h = h + self.positions(h.shape[-1])
        after = []
        for i in range(depth):
            h = self.block(h, c[:, None], f"blocks.{i}", heads)
            after.append(h)
        return self.final(h, c[:, None], x.shape[1]), after

    def ditdh(self, x, t, labels, heads, depth, head_heads, head_depth):
        angles = 2 * math.pi * t[:, None] * self.s["t_embedder.W"]
        time = self.mlp(torch.cat([angles.sin(), angles.cos()], -1))
        c = self.silu(time + self.s["y_embedder.embedding_table.weight"][labels])
        h = self.patches(x, "s_embedder")
        h = h + self.positions(h.shape[-1])
        after = []
        for i in range(depth):
            h = self.block(h, c[:, None], f"blocks.{i}", heads)
            after.append(h)
        s = self.silu(time[:, None] + h)
        s = self.linear(s, "s_projector") if "s_projector.weight" in self.s else s
        h = self.patches(x, "x_embedder")
        for i in range(depth, depth + head_depth):
            h = self.block(h, s, f"blocks.{i}", head_heads)
        return self.final(h, s, x.shape[1]), after


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"patch_size": 1, "heads": 3, "align_depth": 3}], ids=["patch 2", "patch 1"])
def test_lightningdit_is_its_formula(options, qk_norm):
    denoiser = random_weights(lightningdit(qk_norm=qk_norm, **options))
    x, t, labels = inputs()
    out = denoiser(x, t, Condition(labels))
    patch = options.get("patch_size", 2)
    formulas = Formulas(denoiser.state_dict(), 6 // patch, patch)
    velocity, after = formulas.lightningdit(x, t, labels, options.get("heads", 2), 3)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.tokens, after[denoiser.align_depth - 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("options", [{}, {"head_width": 24, "head_heads": 2, "head_depth": 1, "patch_size": 1}],
                         ids=["wide head", "head of the base's width"])  # fmt: skip
def test_ditdh_is_its_formula(options, qk_norm):
    denoiser = random_weights(ditdh(qk_norm=qk_norm, **options))
    x, t, labels = inputs()
    out = denoiser(x, t, Condition(labels))
    patch = options.get("patch_size", 2)
    formulas = Formulas(denoiser.state_dict(), 6 // patch, patch)
    head = options.get("head_heads", 4), options.get("head_depth", 2)
    velocity, after = formulas.ditdh(x, t, labels, 2, 3, *head)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.tokens, after[1], rtol=1e-10, atol=1e-10)


def test_weights_of_reversed_time_answer_as_on_their_own_time():
    """With reversed time, 0 is noise and 1 is data, and the velocity points to the data."""
    theirs, ours = (random_weights(lightningdit(reversed_time=r)) for r in (False, True))
    x, t, labels = inputs()
    found, expected = ours(x, t, Condition(labels)), theirs(x, 1 - t, Condition(labels))
    torch.testing.assert_close(found.velocity, -expected.velocity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.tokens(x, t, Condition(labels)), expected.tokens, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_alone_are_those_of_the_whole_pass(name):
    denoiser = random_weights(MAKERS[name]())
    assert isinstance(denoiser, Denoiser)
    x, t, labels = inputs()
    whole = denoiser(x, t, Condition(labels))
    ran = []
    for i, block in enumerate(denoiser.units()):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    assert torch.equal(denoiser.tokens(x, t, Condition(labels)), whole.tokens) and ran == [0, 1]
    several = random_weights(MAKERS[name](align_depth=[1, 3]))
    first, last = several.tokens(x, t, Condition(labels))
    assert torch.equal(last, several(x, t, Condition(labels)).tokens[1]) and not torch.equal(first, last)


# Counted as the published code does, including the fixed position embedding and the fixed frequencies. XL: "675.26M" in
# docs/log.txt of hustvl/LightningDiT; "839M" in table 1 of RAE. The other sizes have no published count: theirs follow
# from the structure of the published code.
LIGHTNINGDIT = {"B": 130_556_192, "L": 458_152_960, "XL": 675_256_736, "1p0B": 1_029_401_120, "1p6B": 1_631_767_120}
DITDH = {"S": 196_455_764, "B": 294_295_892, "L": 621_744_436, "XL": 838_675_796}


def count(denoiser: torch.nn.Module, *fixed: torch.Tensor) -> int:
    return sum(t.numel() for t in (*denoiser.parameters(), *fixed))


def formula(width: int) -> int:
    """Parameter count of a block: two norms, qkv, projection, SwiGLU, modulation."""
    hidden = int(2 / 3 * 4 * width)
    products = 3 * width + width + 2 * hidden + 6 * width
    return 2 * width + products * (width + 1) + (hidden + 1) * width


def test_parameter_counts_of_lightningdit_are_the_published_ones():
    for size, published in LIGHTNINGDIT.items():
        with torch.device("meta"):
            m = LightningDiT(LatentShape(32, 16, 16), 1000, size=size)
        assert count(m, m.pos_embed) == published
        assert count(m.blocks[0]) == formula(m.width)
    assert round(LIGHTNINGDIT["XL"] / 1e4) == 67526


def test_parameter_counts_of_ditdh_are_the_published_ones():
    for size, published in DITDH.items():
        with torch.device("meta"):
            m = DiTDH(LatentShape(768, 16, 16), 1000, size=size)
        assert count(m, m.pos_embed, m.t_embedder.W) == published
        assert count(m.blocks[0]) == formula(m.width) and count(m.blocks[-1]) == formula(2048)
    assert round(DITDH["XL"] / 1e6) == 839


BLOCK = [
    "norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
    "mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias", "adaLN_modulation.1.weight",
    "adaLN_modulation.1.bias",
]  # fmt: skip
SHARED = [
    "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight",
    "final_layer.norm_final.weight", "final_layer.linear.weight", "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
]  # fmt: skip


def test_state_dict_keys_are_the_published_ones():
    """From reading the modules of the published code; shapes are given where they are not a linear layer's."""
    blocks = {f"blocks.{i}.{key}" for i in range(3) for key in BLOCK}
    state = lightningdit().state_dict()
    assert set(state) == blocks | {*SHARED, "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert state["pos_embed"].shape == (1, 9, 24) and state["feat_rope.freqs_cos"].shape == (9, 12)
    assert state["blocks.0.mlp.w12.weight"].shape == (128, 24) and state["x_embedder.proj.weight"].shape == (
        24,
        3,
        2,
        2,
    )
    with_norm = set(lightningdit(qk_norm=True).state_dict()) - set(state)
    assert with_norm == {f"blocks.{i}.attn.{name}_norm.weight" for i in range(3) for name in "qk"}

    blocks = {f"blocks.{i}.{key}" for i in range(5) for key in BLOCK}
    ropes = {f"{part}_feat_rope.freqs_{f}" for part in ("enc", "dec") for f in ("cos", "sin")}
    own = {"t_embedder.W", "s_embedder.proj.weight", "s_embedder.proj.bias", "s_projector.weight", "s_projector.bias"}
    state = ditdh().state_dict()
    assert set(state) == blocks | {*SHARED} | ropes | own
    assert state["t_embedder.W"].shape == (256,) and state["t_embedder.mlp.0.weight"].shape == (24, 512)
    assert state["dec_feat_rope.freqs_sin"].shape == (9, 8) and state["blocks.4.norm1.weight"].shape == (32,)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_fixed_stays_fixed(name):
    denoiser = MAKERS[name]().requires_grad_(True)
    trained = {key for key, _ in denoiser.named_parameters()}
    assert not [key for key in trained if "pos_embed" in key or "rope" in key or key.endswith(".W")]


@pytest.mark.parametrize("name", MAKERS)
def test_a_new_network_is_materialized_whole_and_says_zero(name):
    """Every block starts as the identity; the aligned tokens are the input's embeddings at first."""
    with torch.device("meta"):
        denoiser = MAKERS[name]()
    torch.manual_seed(0)
    materialize(denoiser, torch.device("cpu"))
    x, t, labels = (part.float() if part.is_floating_point() else part for part in inputs())
    velocity, tokens, *_ = denoiser(x, t, Condition(labels))
    embed = denoiser.x_embedder if name == "lightningdit" else denoiser.s_embedder
    assert not velocity.any() and torch.equal(tokens, embed(x) + denoiser.pos_embed)
    direct = MAKERS[name]()
    torch.manual_seed(0)
    direct.init_weights()
    assert all(torch.equal(value, direct.state_dict()[key]) for key, value in denoiser.state_dict().items())


def test_norms_and_rotations_are_fp32_islands():
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(2)) * 30
    norm, rope = RMSNorm(64), Rotary(64, 3)
    rope.init_weights()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.bfloat16()), rotate(x.bfloat16(), *rope())
    exact = norm(x.bfloat16().float()), rotate(x.bfloat16().float(), *rope())
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, exact))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16  # when the weights themselves are bf16
    with torch.autocast("cpu", torch.bfloat16):
        embed = FourierEmbedding(16)
        embed.init_weights()
        a, b = embed(torch.tensor([0.9991, 1.0]), torch.float32)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_under_autocast_the_network_stays_close(name):
    denoiser = random_weights(MAKERS[name](qk_norm=True)).float()
    x, t, labels = (part.float() if part.is_floating_point() else part for part in inputs())
    exact = denoiser(x, t, Condition(labels)).velocity
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(x, t, Condition(labels)).velocity
    assert 0 < (found - exact).abs().max() / exact.abs().max() < 0.05


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align_depth": 4}, "denoiser.align_depth = 4: expected 1 to 3"),
        ({"patch_size": 4}, "denoiser.patch_size = 4 .* latent size 6; allowed: 1, 2, 3, 6"),
        ({"heads": 4}, "denoiser.width = 24 with denoiser.heads = 4: .* multiple of 4"),
        ({"label_dropout": 1.0}, "denoiser.label_dropout = 1.0"),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        MAKERS[name](**options)


def test_bad_options_of_the_head_are_named():
    with pytest.raises(ValueError, match=r"denoiser\.head_width = 30 with denoiser.head_heads = 4"):
        ditdh(head_width=30)
    with pytest.raises(ValueError, match=r"denoiser\.head_depth = 0"):
        ditdh(head_depth=0)
    with pytest.raises(ValueError, match="'ditdh' needs square latents; got 4 x 6"):
        DiTDH(LatentShape(3, 4, 6), CLASSES)


@pytest.mark.long
def test_one_graph_for_each_kind_of_block():
    """At any depth, without breaks, and with fixed shapes: base and head share code, but not their width."""
    torch._dynamo.reset()
    graphs, symbols = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        symbols.extend(s for s in example_inputs if isinstance(s, torch.SymInt))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    plain, compiled = (random_weights(ditdh(qk_norm=True)) for _ in range(2))
    compile_units(compiled, backend=backend)
    assert all(isinstance(block, LightningBlock) for block in compiled.units())
    for denoiser in (plain, compiled):
        loss(denoiser, *inputs()).backward()
    for (key, p), q in zip(plain.named_parameters(), compiled.parameters()):
        assert relative(q.grad, p.grad) < 1e-10, key
    assert len(graphs) == 2 and not symbols
    torch._dynamo.reset()


def loss(denoiser, x, t, labels) -> torch.Tensor:
    velocity, tokens, *_ = denoiser(x, t, Condition(labels))
    return velocity.square().mean() + tokens.square().mean()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def sharded(rank: int, world: int) -> dict[str, float]:
    """Return the largest relative differences between two ranks under FSDP2 and one process with the same weights."""
    found = {}
    for name, make in MAKERS.items():
        with torch.device("meta"):
            denoiser = make(qk_norm=True).double()
        shard(denoiser, Sharding(make_mesh("cpu", (1, world))))
        torch.manual_seed(0)
        materialize(denoiser, torch.device("cpu"))
        with WholeTensorRandom(), torch.no_grad():
            for p in denoiser.parameters():
                torch.nn.init.normal_(p, std=0.2)
        alone = make(qk_norm=True).double()
        alone.load_state_dict({key: getattr(v, "full_tensor", v.clone)() for key, v in denoiser.state_dict().items()})
        x, t, labels = (part[rank::world] for part in inputs())
        with torch.no_grad():
            difference = denoiser.tokens(x, t, Condition(labels)) - alone.tokens(x, t, Condition(labels))
        loss(denoiser, x, t, labels).backward()
        loss(alone, *inputs()).backward()
        found[f"{name}/tokens"] = difference.abs().max().item()
        for (key, p), q in zip(denoiser.named_parameters(), alone.parameters()):
            found[f"{name}/{key}"] = relative(p.grad.full_tensor(), q.grad)
    return found


@pytest.mark.long
def test_sharded_ranks_compute_what_one_process_does():
    for found in run_ranks(sharded, 2):
        assert len(found) > 60 and max(found.values()) < 1e-10, max(found.items(), key=lambda item: item[1])


OPTIONS = {
    "lightningdit": [],
    "ditdh": ["--denoiser.head_width=48", "--denoiser.head_heads=2"],
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.long
def test_trains_end_to_end(name, tmp_path):
    """REPA-E on the embedded dataset: tokenizer, discriminator, denoiser and heads learn."""
    (tmp_path / "toy.toml").write_text(toys.TOML)
    options = ["--run.checkpoint_every=0", "--training.steps=6", f"--denoiser.name={name}", "--denoiser.patch_size=2",
               "--flow.time=lognormal", "--flow.shift=auto", *OPTIONS[name]]  # fmt: skip
    trainer = Trainer(config.load(str(tmp_path / "toy.toml"), [f"--run.dir={tmp_path / 'run'}", *options]), World(0, 1))
    before = {key: p.detach().clone() for key, p in parameters(trainer)}
    found = finished(trainer)
    assert len(found["steps"]) == 6
    for values in found["steps"]:
        assert all(math.isfinite(v) for v in values.values()) and values["skipped_steps"] == 0
        assert 0 < values["denoiser/velocity"] < 10 and "tokenizer/align" in values
    # Zero modulations delay the blocks' products for a few steps, those of a base before its head for five.
    still = [key for key, p in parameters(trainer) if torch.equal(p, before[key])]
    frozen = {"encoders.tiny_vit", "discriminator.network.main.8.bias"}  # real and fake cancel in the last bias
    assert not [key for key in still if not key.startswith(tuple(frozen))], still


def parameters(trainer: Trainer):
    for part, module in trainer.parts.modules.named().items():
        for key, p in module.named_parameters():
            yield f"{part}.{key}", p
