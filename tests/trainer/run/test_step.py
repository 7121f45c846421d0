"""The training step's features: accumulation, schedules, clipping, averages and groups."""

import math

import pytest
import torch

from components.contracts import Batch, Condition
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from components.registry import discover, recipes
from plugins.optimizers.adamw import AdamW
from tests.support import toys
from trainer.run.step import Step

discover("plugins")


def make_step(m, name: str, accumulation: int) -> Step:
    recipe = recipes.get(name).cls()
    for part, module in m.named().items():
        module.requires_grad_(any(part in members for members in recipe.trains.values()))
    groups = {
        group: ParameterGroup(group, {part: getattr(m, part) for part in parts}, AdamW, schedule=Schedule(1e-2))
        for group, parts in recipe.trains.items()
    }
    return Step(recipe, m, groups, ema=None, accumulation=accumulation, autocast_dtype=None,
                device=torch.device("cpu"))  # fmt: skip


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_one_large_batch(accumulation):
    """With frozen batch norms (here: none) k micro-batches equal one batch, up to rounding."""
    weights = []
    for k in (1, accumulation):
        m = toys.modules()
        step = make_step(m, "repa", k)
        for s in range(3):
            batch, draws = toys.batch(s, size=8)
            images, labels = batch.images.chunk(k), batch.condition.label.chunk(k)
            numbers = [{name: x.chunk(k)[i] for name, x in draws.items()} for i in range(k)]
            step(s, [(Batch(x, Condition(y)), d) for x, y, d in zip(images, labels, numbers)])
        weights.append(torch.cat([p.detach().flatten() for p in step.groups["denoiser"].parameters]))
    assert torch.allclose(*weights, rtol=1e-10, atol=1e-12)


def test_an_update_of_an_unknown_group_names_the_groups():
    step = make_step(toys.modules(), "ldm", 1)
    with pytest.raises(KeyError, match=r"'tokenizer'.*\['denoiser'\]"):
        step._update("tokenizer", {})


def test_discriminator_waits_for_its_start_step():
    m = toys.modules()
    m.discriminator.start_step = 1
    step = make_step(m, "tokenizer", 1)
    before = [p.clone() for p in m.discriminator.parameters()]
    first = step(0, [toys.batch()]).read()
    assert all(torch.equal(a, b) for a, b in zip(before, m.discriminator.parameters()))
    assert first["tokenizer/gan"] == 0 and "grad_norm/discriminator" not in first
    step(1, [toys.batch()])
    assert not all(torch.equal(a, b) for a, b in zip(before, m.discriminator.parameters()))


def test_gradients_are_clipped_to_the_norm():
    layer = torch.nn.Linear(4, 4)
    group = ParameterGroup("g", {"layer": layer}, AdamW, schedule=Schedule(1.0), clip_norm=0.5)
    for p in group.parameters:
        p.grad = torch.full_like(p, 3.0)
    norms = group.norms()
    assert group.names == ["layer.weight", "layer.bias"]
    assert norms.tolist() == pytest.approx([3 * math.sqrt(16), 3 * math.sqrt(4)])
    seen = []
    group.optimizer.step = lambda: seen.append(group.norms().norm().item())
    group.apply(0, norms.norm(), torch.tensor(True))
    assert seen == [pytest.approx(0.5, rel=1e-5)]


def test_ema_is_the_weighted_mean_of_all_steps():
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("statistic", torch.zeros(3))
    layer.register_buffer("count", torch.zeros((), dtype=torch.long))
    ema = Ema({"layer": layer}, decay=0.9)
    expected = layer.weight.detach().clone()
    for k in range(1, 4):
        with torch.no_grad():
            layer.weight.add_(k)
            layer.statistic.fill_(k)
            layer.count.fill_(k)
        ema.update(torch.tensor(True))
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    copy = ema.modules["layer"]
    assert torch.allclose(copy.weight, expected)
    assert torch.allclose(copy.statistic, torch.full((3,), 0.1 * (1 * 0.81 + 2 * 0.9 + 3)))
    assert copy.count == 3 and not copy.weight.requires_grad
    ema.update(torch.tensor(False))
    assert torch.allclose(copy.weight, expected)
