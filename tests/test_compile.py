"""torch.compile: every part in one graph, no recompilation after the first steps, the same numbers as eager.

The backend is aot_eager, which traces forward and backward as inductor does and compiles in a fraction of the time.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from components.ema import Ema
from components.optimizer import ParameterGroup, Schedule
from components.parallel import compile_units
from components.registry import discover, recipes
from tests import toys
from trainer.step import Step

discover("plugins")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(recipe_name: str, compiled: bool, steps: int) -> tuple[list[dict[str, float]], list[int]]:
    """Metrics of each step, and how many graphs had been compiled behind it."""
    recipe = recipes.get(recipe_name).cls()
    m = toys.modules(dtype=torch.float32)
    for name, module in m.named().items():
        module.requires_grad_(any(name in members for members in recipe.trains.values()))
    if compiled:
        networks = [m.tokenizer, m.denoiser, m.discriminator, *m.heads, *m.encoders.values()]
        for module in networks:
            compile_units(module, backend="aot_eager")
    groups = {
        name: ParameterGroup(name, {part: getattr(m, part) for part in parts}, schedule=Schedule(1e-4))
        for name, parts in recipe.trains.items()
    }
    ema = Ema({"latent_norm": m.latent_norm}, 0.9)
    step = Step(recipe, m, groups, ema=ema, accumulation=1, autocast_dtype=None,
                device=torch.device("cpu"))  # fmt: skip
    found, graphs = [], []
    for k in range(steps):
        found.append(step(k, [toys.batch(k, dtype=torch.float32)]).read())
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e"])
def test_compiled_equals_eager_and_does_not_recompile(recipe):
    eager, _ = losses(recipe, compiled=False, steps=3)
    counters.clear()
    compiled, graphs = losses(recipe, compiled=True, steps=20)
    assert graphs[1] > 0 and graphs[-1] == graphs[1], f"graphs compiled behind each step: {graphs}"
    for a, b in zip(eager, compiled):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
