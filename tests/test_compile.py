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
from tests.ranks import run_ranks
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


def sharded_graphs(rank: int, world: int, toml: str, folder: str, recompute: str) -> list[int]:
    """Graphs compiled behind each step of a run with everything on, drawing pictures on the way."""
    from components import parallel
    from components.parallel import World
    from trainer import config
    from trainer.loop import Trainer

    torch.set_num_threads(1)
    original = parallel.compile_units
    parallel.compile_units = lambda module, backend: original(module, "aot_eager")
    options = ["--training.steps=20", "--training.compile", "--sampling.every=10", "--run.log_every=10",
               "--run.checkpoint_every=0", f"--activation_checkpoint.denoiser={recompute}",
               f"--activation_checkpoint.tokenizer={recompute}"]  # fmt: skip
    trainer = Trainer(config.load(toml, [f"--run.dir={folder}", *options]), World(rank, world))
    graphs, observe = [], trainer.watch.observe

    def observed(*arguments):
        graphs.append(counters["stats"]["unique_graphs"])
        return observe(*arguments)

    trainer.watch.observe = observed
    trainer.run()
    return graphs


def test_sharded_recomputing_runs_do_not_recompile_either(tmp_path):
    """fullgraph, so no graph breaks; the pictures' passes without gradients may compile once more, at the first."""
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    for graphs in run_ranks(sharded_graphs, 2, str(toml), str(tmp_path / "run"), "selective"):
        assert len(graphs) == 20 and graphs[1] > 0
        assert graphs[1] == graphs[9], f"graphs compiled behind each step: {graphs}"
        assert graphs[10] == graphs[-1], f"graphs compiled behind each step: {graphs}"


def test_inductor_equals_eager(tmp_path):
    """One block of each kind through the backend that runs really use."""
    m = toys.modules(dtype=torch.float32)
    block, stage = m.denoiser.blocks[0], m.tokenizer.decoder.mid
    for unit, inputs in ((block, (torch.randn(2, 16, 32), torch.randn(2, 32))), (stage, (torch.randn(2, 16, 8, 8),))):
        expected = unit(*inputs)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in unit.parameters()]
        unit.zero_grad()
        compile_units(unit)
        found = unit(*inputs)
        found.square().mean().backward()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        for p, expected_gradient in zip(unit.parameters(), gradients):
            assert torch.allclose(p.grad, expected_gradient, rtol=1e-3, atol=1e-5)
