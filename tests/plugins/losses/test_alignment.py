"""Alignment beyond the published setting: encoder weights, several depths, iREPA's head and targets, and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from components.contracts import AlignmentLoss, Condition, Modules
from components.diffusion.losses import alignment, denoising, encode_targets
from components.distributed.parallel import World
from components.nn.alignment_heads import ConvHead
from plugins.denoisers.sit import SiT
from plugins.losses.cosine import Cosine, spatially_normalized
from plugins.recipes.repa import Repa
from plugins.recipes.repae import RepaE
from tests.support import toys
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def load(tmp_path, *overrides: str):
    path = tmp_path / "toy.toml"
    path.write_text(toys.TOML)
    return config.load(str(path), [f"--run.dir={tmp_path}/run", *overrides])


def cosine_by_hand(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -((p * y).sum(-1) / (p.square().sum(-1).sqrt() * y.square().sum(-1).sqrt())).mean()


# -- several encoders and depths ---------------------------------------------------------------------------------


def test_encoders_count_by_their_weight_at_every_depth():
    targets = [normal(2, 9, 5, seed=1), normal(2, 9, 7, seed=2)]
    depths = normal(2, 9, 6, seed=3), normal(2, 9, 6, seed=4)
    m = Modules(encoders={"a": None, "b": None}, alignment=Cosine(head_width=8))
    m.heads = m.alignment.make_heads(6, [5, 7, 5, 7], 3).double()
    values = [cosine_by_hand(m.heads[i](depths[i // 2]), targets[i % 2]) for i in range(4)]

    def found(tokens) -> torch.Tensor:
        term = alignment(m, tokens, targets, 0.5, 0)["align"]
        assert term.weight == 0.5
        return term.value

    torch.testing.assert_close(found(depths), sum(values) / 4, rtol=1e-13, atol=0)
    m.encoder_weights = {"a": 3.0, "b": 1.0}
    by_hand = (3 * values[0] + values[1] + 3 * values[2] + values[3]) / 8
    torch.testing.assert_close(found(depths), by_hand, rtol=1e-13, atol=0)
    m.heads = m.heads[:2]
    torch.testing.assert_close(found(depths[0]), (3 * values[0] + values[1]) / 4, rtol=1e-13, atol=0)
    with pytest.raises(ValueError):  # heads for a different number of depths
        found(depths)


def test_one_depth_and_equal_weights_are_the_published_case():
    """The same loss bit for bit as from all pairs at once, with the same heads."""
    m = toys.modules()
    m.encoders["other"] = m.encoders["patches"]
    m.heads = m.alignment.make_heads(32, [12, 12], 4).double()
    hidden, targets = normal(4, 16, 32), [normal(4, 16, 12, seed=1), normal(4, 16, 12, seed=2)]
    whole = m.alignment.align([head(hidden) for head in m.heads], targets)
    assert torch.equal(alignment(m, hidden, targets, 0.5, 0)["align"].value, whole)


def test_tokens_come_from_each_depth():
    torch.manual_seed(0)
    nets = {d: SiT(toys.LATENT, 10, width=32, depth=3, heads=2, align_depth=d).double() for d in (1, 3, (1, 3))}
    nets[1, 3].align_depth = [1, 3]
    for p in nets[1].parameters():
        nn.init.normal_(p, std=0.1)
    for net in nets.values():
        net.load_state_dict(nets[1].state_dict())
    given = normal(2, *toys.LATENT), torch.tensor([0.2, 0.7]).double(), Condition(torch.tensor([1, 10]))
    after = {}
    for number, block in enumerate(nets[1].blocks, 1):
        block.register_forward_hook(lambda _, __, out, number=number: after.update({number: out}))
    velocity = nets[1](*given).velocity
    both = nets[1, 3](*given)
    assert isinstance(both.tokens, tuple) and torch.equal(both.velocity, velocity)
    for got, again, depth in zip(both.tokens, nets[1, 3].tokens(*given), (1, 3), strict=True):
        assert torch.equal(got, after[depth]) and torch.equal(got, again)
        assert torch.equal(got, nets[depth].tokens(*given))


@pytest.mark.parametrize("wrong", ["[]", "[2,1]", "[1,1]", "[0,1]", "[1,3]"])
def test_depths_that_cannot_be_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"align_depth.*increasing list"):
        assemble.check(load(tmp_path, f"--denoiser.align_depth={wrong}"), 1)


@pytest.mark.parametrize("wrong", ["0", "-1.0", "much"])
def test_a_weight_that_is_not_positive_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"encoders\.tiny_vit\.weight"):
        load(tmp_path, f"--encoders.tiny_vit.weight={wrong}")


# -- iREPA -------------------------------------------------------------------------------------------------------


def test_spatial_normalization_by_hand():
    y, gamma = 3 + normal(2, 9, 4), 0.6
    by_hand = torch.empty_like(y)
    for b in range(2):
        for d in range(4):
            values = y[b, :, d].tolist()
            mean = sum(values) / 9
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / 8)  # unbiased, as published
            by_hand[b, :, d] = torch.tensor([(v - gamma * mean) / (std + 1e-6) for v in values])
    torch.testing.assert_close(spatially_normalized(y, gamma), by_hand, rtol=1e-6, atol=1e-6)
    p = normal(2, 9, 4, seed=1)
    loss = Cosine(spatial_norm=True, gamma=gamma)
    torch.testing.assert_close(loss.align([p], [y]), cosine_by_hand(p, spatially_normalized(y, gamma)))
    assert not torch.allclose(loss.align([p], [y]), Cosine().align([p], [y]))
    assert spatially_normalized(y.bfloat16(), gamma).dtype == torch.float32


def test_convolutional_head_by_hand():
    torch.manual_seed(0)
    head = Cosine(head="conv").make_heads(3, [2], 4)[0].double()
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "projection_layer.weight": (2, 3, 3, 3),
        "projection_layer.bias": (2,),
    }
    tokens = normal(1, 16, 3)
    weight, bias = head.projection_layer.weight, head.projection_layer.bias
    for row, column in ((0, 0), (1, 2), (3, 3)):
        expected = bias.clone()
        for i in range(3):
            for j in range(3):
                r, c = row + i - 1, column + j - 1
                if 0 <= r < 4 and 0 <= c < 4:
                    expected = expected + weight[:, :, i, j] @ tokens[0, 4 * r + c]
        torch.testing.assert_close(head(tokens)[0, 4 * row + column], expected)
    with pytest.raises(ValueError, match=r"17 tokens.*mlp"):
        ConvHead(3, 2)(torch.zeros(1, 17, 3))


# -- schedules ---------------------------------------------------------------------------------------------------


def test_schedules():
    assert [Cosine().strength(k) for k in (0, 10**6)] == [1.0, 1.0]
    stop, cosine = Cosine(schedule="stop", stop_step=4), Cosine(schedule="cosine", stop_step=4)
    assert [stop.strength(k) for k in range(6)] == [1, 1, 1, 1, 0, 0]
    expected = [1.0, 0.5 * (1 + 0.5**0.5), 0.5, 0.5 * (1 - 0.5**0.5), 0.0, 0.0]
    assert [cosine.strength(k) for k in range(6)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "stop"},
        {"schedule": "cosine"},
        {"stop_step": 4},
        {"schedule": "stop", "stop_step": -1},
        {"gamma": 1.5},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"stop_step|gamma"):
        Cosine(**options)


@pytest.mark.parametrize("recipe", [Repa(), RepaE()])
def test_where_alignment_has_stopped_no_encoder_runs(recipe):
    m = toys.modules()
    m.alignment = Cosine(head_width=16, schedule="cosine", stop_step=4)
    batch, draws = toys.batch()
    calls = []
    m.encoders["patches"].register_forward_hook(lambda *_: calls.append(1))
    weights = {}

    def update(group, terms, **_):
        if "align" in terms:
            weights.setdefault(step, {})[group] = terms["align"].weight

    for step in (0, 2, 4, 9):
        recipe.step(m, batch, draws, update, step)
    assert len(calls) == 2 and weights.keys() == {0, 2}
    assert weights[2]["denoiser"] == pytest.approx(0.25) and weights[0]["denoiser"] == 0.5
    if isinstance(recipe, RepaE):
        assert weights[2]["tokenizer"] == pytest.approx(0.75)


def test_a_loss_without_schedule_is_at_full_strength():
    m = toys.modules()
    batch, _ = toys.batch()

    class Plain(AlignmentLoss):
        denoiser_weight, align = 0.5, m.alignment.align

    m.alignment = Plain()
    targets = encode_targets(m, batch, 10**6)
    path = m.flow.sample(normal(4, *toys.LATENT), torch.full((4,), 0.5), normal(4, *toys.LATENT, seed=1))
    assert denoising(m, path, torch.full((4,), 0.5), batch.condition, targets, 10**6)["align"].weight == 0.5


# -- runs --------------------------------------------------------------------------------------------------------

SECOND = ["--encoders.second.name=tiny_vit", "--encoders.second.weight=0.5"]
IREPA = ['--losses.cosine.head="conv"', "--losses.cosine.spatial_norm"]


def run(tmp_path, *overrides: str, steps: int, name: str = "run") -> tuple[list[dict], Trainer]:
    """Return every step's values, and the trainer at the end."""
    seen = []
    c = load(
        tmp_path, "--training.precision=fp64", f"--training.steps={steps}", f"--run.dir={tmp_path}/{name}",
        "--run.async_checkpoints=false", "--latent_norm.images=8", *overrides,
    )  # fmt: skip
    trainer = Trainer(c, World())
    observe = trainer.watch.observe

    def observed(record, values, *rest):
        seen.append(dict(values))
        return observe(record, values, *rest)

    trainer.watch.observe = observed
    trainer.run()
    return seen, trainer


@pytest.mark.long
def test_resumes_a_schedule_exactly(tmp_path):
    options = [*SECOND, *IREPA, "--denoiser.align_depth=[1,2]", "--losses.cosine.schedule=cosine",
               "--losses.cosine.stop_step=3"]  # fmt: skip
    whole, straight = run(tmp_path, *options, steps=4, name="whole")
    assert len(straight.parts.modules.heads) == 4
    assert ["denoiser/align" in values for values in whole] == [True, True, True, False]
    assert all(values["denoiser/loss"] == values["denoiser/velocity"] for values in whole[3:])
    part, _ = run(tmp_path, *options, steps=2, name="resumed")
    rest, resumed = run(tmp_path, *options, steps=4, name="resumed")
    assert [*part, *rest] == whole
    for (name, a), (_, b) in zip(
        straight.parts.modules.heads.named_parameters(), resumed.parts.modules.heads.named_parameters()
    ):
        assert torch.equal(a, b), name
