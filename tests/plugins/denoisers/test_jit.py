"""JiT: its arithmetic against an implementation from the paper, its sizes and settings, and a run on pixels."""

import math

import pytest
import torch

from components.contracts import Condition, LatentShape
from components.distributed.parallel import World, compile_units
from components.registry import discover
from plugins.denoisers.jit import JiT
from plugins.denoisers.lightningdit import LightningDiT
from tests.support import ROOT, toys
from tests.support.runs import finished
from trainer import config
from trainer.__main__ import main
from trainer.run import assemble
from trainer.run.initial_statistics import read_statistics
from trainer.run.loop import Trainer

discover("plugins")
IMAGE, CLASSES, HEADS = LatentShape(3, 12, 12), 5, 2
SMALL = {"width": 24, "depth": 4, "heads": HEADS, "align_depth": [1, 3], "patch_size": 4}
SMALL |= {"bottleneck": 6, "context_tokens": 3, "context_start": 2}


def jit(**options) -> JiT:
    denoiser = JiT(IMAGE, CLASSES, **SMALL | options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in denoiser.parameters():  # no zero hides an error
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return denoiser.double()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, *IMAGE, generator=g, dtype=torch.float64)
    return x, torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64), torch.tensor([0, 3, 4, 5])


class Paper:
    """JiT for one image, from the paper: tokens are rows, positions are (row, column), rotations are 2 x 2 matrices."""

    def __init__(self, state: dict, grid: int, patch: int, context: int, start: int, depth: int) -> None:
        self.s, self.grid, self.patch = state, grid, patch
        self.context, self.start, self.depth = context, start, depth

    def __call__(self, image, t: float, label: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Output (C, h, w) of the network at ``t`` as it was trained, and the patch tokens after each block."""
        y = self.s["y_embedder.embedding_table.weight"][label]
        # In the published code the exponents and their exponentials are float32.
        frequencies = torch.exp(torch.arange(128, dtype=torch.float32) * -math.log(10_000) / 128).double()
        time = torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)])
        c = self.linear(self.silu(self.linear(time, "t_embedder.mlp.0")), "t_embedder.mlp.2") + y
        h, after = self.embed(image), []
        for i in range(self.depth):
            if i == self.start:
                h = torch.cat([torch.stack([y + p for p in self.s["in_context_posemb"][0]]), h])
            h = self.block(h, c, f"blocks.{i}", self.context if i >= self.start else 0)
            after.append(h[-(self.grid**2) :])
        shift, scale = self.linear(self.silu(c), "final_layer.adaLN_modulation.1").chunk(2)
        rows = self.linear(self.rms(after[-1], "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
        p, out = self.patch, torch.empty_like(image)
        for n, row in enumerate(rows):
            i, j = divmod(n, self.grid)
            out[:, i * p : (i + 1) * p, j * p : (j + 1) * p] = row.view(p, p, -1).permute(2, 0, 1)
        return out, after

    def embed(self, image):
        p, rows = self.patch, []
        down = self.s["x_embedder.proj1.weight"].flatten(1)
        up, bias = self.s["x_embedder.proj2.weight"].flatten(1), self.s["x_embedder.proj2.bias"]
        for i in range(self.grid):
            for j in range(self.grid):
                row = up @ (down @ image[:, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten()) + bias
                quarter = len(row) // 4
                angles = [place / 10_000 ** (k / quarter) for place in (j, i) for k in range(quarter)]
                halves = angles[:quarter], angles[quarter:]
                waves = [f(a) for half in halves for f in (math.sin, math.cos) for a in half]
                rows.append(row + torch.tensor(waves, dtype=torch.float32).double())
        return torch.stack(rows)

    def block(self, h, c, name, context):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(self.silu(c), f"{name}.adaLN_modulation.1").chunk(6)
        h = h + gate1 * self.attention(self.rms(h, f"{name}.norm1") * (1 + scale1) + shift1, f"{name}.attn", context)
        a, b = self.linear(self.rms(h, f"{name}.norm2") * (1 + scale2) + shift2, f"{name}.mlp.w12").chunk(2, dim=1)
        return h + gate2 * self.linear(self.silu(a) * b, f"{name}.mlp.w3")

    def attention(self, h, name, context):
        q, k, v = self.linear(h, f"{name}.qkv").chunk(3, dim=1)
        d, heads = q.shape[1] // HEADS, []
        for head in range(HEADS):
            qh, kh, vh = (part[:, head * d : (head + 1) * d] for part in (q, k, v))
            qh, kh = (self.turn(self.rms(part, f"{name}.{n}_norm"), context) for part, n in ((qh, "q"), (kh, "k")))
            heads.append(torch.softmax(qh @ kh.T / math.sqrt(d), dim=1) @ vh)
        return self.linear(torch.cat(heads, dim=1), f"{name}.proj")

    def turn(self, rows, context):
        """Rotate the patches' rows; the first ``context`` rows have no position."""
        rows, d = rows.clone(), rows.shape[1]
        for n in range(context, len(rows)):
            i, j = divmod(n - context, self.grid)
            for pair in range(d // 2):
                place, k = (i, pair) if pair < d // 4 else (j, pair - d // 4)
                angle = torch.tensor(place * 10_000 ** (-4 * k / d), dtype=torch.float64)
                cos, sin = angle.cos().float().double(), angle.sin().float().double()  # as the published tables
                rows[n, 2 * pair : 2 * pair + 2] = (
                    torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
                    @ (rows[n, 2 * pair : 2 * pair + 2])
                )
        return rows

    def linear(self, x, name):
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def rms(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.s[f"{name}.weight"]

    @staticmethod
    def silu(x):
        return x / (1 + (-x).exp())


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("reversed_time", [False, True])
def test_jit_is_what_the_paper_says(start, reversed_time):
    """With reversed time, the network sees JiT's own time, 1 at the data; it predicts the data either way."""
    denoiser = jit(context_start=start, reversed_time=reversed_time)
    x_t, t, labels = inputs()
    out = denoiser(x_t, t, Condition(labels))
    paper = Paper(denoiser.state_dict(), 3, 4, 3, start, 4)
    for n in range(len(t)):
        time = t[n].item()
        data, after = paper(x_t[n], 1 - time if reversed_time else time, int(labels[n]))
        torch.testing.assert_close(out.velocity[n], (x_t[n] - data) / max(time, 0.05), rtol=1e-10, atol=1e-10)
        for tokens, depth in zip(out.tokens, (1, 3)):
            torch.testing.assert_close(tokens[n], after[depth - 1], rtol=1e-10, atol=1e-10)
    for found, expected in zip(denoiser.tokens(x_t, t, Condition(labels)), out.tokens):
        assert torch.equal(found, expected)


def test_without_its_options_it_is_lightningdit():
    plain = jit(bottleneck=0, context_tokens=0, context_start=0, prediction="velocity")
    other = LightningDiT(IMAGE, CLASSES, qk_norm=True, **{k: v for k, v in SMALL.items() if k not in
                         ("bottleneck", "context_tokens", "context_start")}).double()  # fmt: skip
    other.load_state_dict(plain.state_dict())
    x_t, t, labels = inputs()
    assert torch.equal(plain(x_t, t, Condition(labels)).velocity, other(x_t, t, Condition(labels)).velocity)


@pytest.mark.parametrize(("size", "start"), [("B", 4), ("L", 8), ("H", 10)])
def test_sizes_are_the_published_ones(size, start):
    """Counted from the published structure: embeddings, context positions, blocks, output."""
    width, depth, bottleneck = {"B": (768, 12, 128), "L": (1024, 24, 128), "H": (1280, 32, 256)}[size]
    with torch.device("meta"):
        denoiser = JiT(LatentShape(3, 256, 256), 1000, size=size)
    hidden, head = int(4 * width * 2 / 3), width // (12 if size == "B" else 16)
    block = 2 * width + (3 + 1 + 6) * width * (width + 1) + 2 * hidden * (width + 1) + (hidden + 1) * width + 2 * head
    embeddings = 768 * bottleneck + (bottleneck + 1) * width + (257 + width) * width + width + 1001 * width + 32 * width
    output = width + 2 * width * (width + 1) + 768 * (width + 1)
    assert sum(p.numel() for p in denoiser.parameters()) == embeddings + depth * block + output
    assert (denoiser.grid, denoiser.context_start, len(denoiser.blocks)) == (16, start, depth)


def test_bad_options_are_named():
    for options, words in (
        ({"context_start": 4}, "denoiser.context_start = 4: expected 0 to 3"),
        ({"bottleneck": -1}, "denoiser.bottleneck = -1"),
        ({"context_tokens": -2}, "denoiser.context_tokens = -2"),
    ):
        with pytest.raises(ValueError, match=words):
            jit(**options)


def test_config_has_the_published_settings(monkeypatch):
    """The noise scale is 1 on pixels in [-1, 1], so the latent norm must leave them alone."""
    monkeypatch.chdir(ROOT)
    c = config.load("train_configs/jit_b16.toml")
    images = 1_281_167 // 1024
    assert (c.training.steps, c.optimizer.warmup_steps) == (600 * images, 5 * images)
    o = c.optimizer.group("denoiser")
    assert (o.lr, o.betas, o.weight_decay, o.schedule) == (5e-5 * 1024 / 256, [0.9, 0.95], 0.0, "constant")
    assert o.clip_norm == 0 and c.ema.decay == 0.9999
    m = assemble.check(c, 8).modules
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logit = torch.logit(1 - m.flow.times(u))  # of the published time
    assert logit.mean().item() == pytest.approx(-0.8, abs=0.01) and logit.std().item() == pytest.approx(0.8, abs=0.01)
    mean, std = read_statistics(c.latent_norm.statistics)
    assert mean.tolist() == [0, 0, 0] and std.tolist() == [1, 1, 1]


@pytest.mark.long
def test_one_graph_before_and_one_after_the_class_tokens_join():
    torch._dynamo.reset()
    graphs, symbols = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        symbols.extend(s for s in example_inputs if isinstance(s, torch.SymInt))
        return graph

    plain, compiled = jit(), jit()
    compile_units(compiled, backend=backend)
    x_t, t, labels = inputs()
    found, expected = (each(x_t, t, Condition(labels)).velocity for each in (compiled, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(graphs) == 2 and not symbols
    torch._dynamo.reset()


PIXELS = toys.TOML[toys.TOML.index("[dataset]") :]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["ldm", "repa"])
def test_trains_and_samples_on_pixels(recipe, tmp_path):
    """With and without alignment: all weights learn, and the run samples with guidance."""
    toml = tmp_path / "toy.toml"
    head = toys.TOML[: toys.TOML.index("[recipe]")]
    denoiser = "width = 32\ndepth = 3\nheads = 2\nalign_depth = 2\npatch_size = 8\nbottleneck = 8\ncontext_tokens = 2\n"
    aligned = "[encoders.tiny_vit]\n[losses.cosine]\nhead_width = 32\n" if recipe == "repa" else ""
    toml.write_text(
        f'{head}[recipe]\nname = "{recipe}"\n[tokenizer]\nname = "identity"\n[denoiser]\nname = "jit"\n{denoiser}'
        f'{aligned}[flow]\ntime = "lognormal"\ntime_mean = 0.8\n{PIXELS}'
    )
    trainer = Trainer(config.load(str(toml), [f"--run.dir={tmp_path / 'run'}"]), World(0, 1))
    before = {key: p.detach().clone() for key, p in trainer.parts.modules.denoiser.named_parameters()}
    steps = finished(trainer)["steps"]
    assert len(steps) == 6 and all(math.isfinite(values["denoiser/velocity"]) for values in steps)
    after = dict(trainer.parts.modules.denoiser.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(value, after[key])]
    words = ["--num-samples=2", "--steps=3", "--method=heun", f"--out={tmp_path}/samples", "--guidance=2"]
    assert main(["sample", f"{tmp_path}/run", *words]) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
