"""torch.compile: one graph per unit, no recompilation after the first steps, and the same numbers as eager.

The backend is aot_eager, which traces forward and backward as inductor does and compiles in a fraction of the time.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from components.distributed.parallel import World, compile_units
from components.registry import discover
from tests.support import toys
from tests.support.compiled import assert_learns_alike, learn
from tests.support.ranks import run_ranks
from tests.support.runs import compiled_by_aot_eager, finished, largest_difference
from trainer import config
from trainer.run import initial_statistics, loop
from trainer.run.loop import Trainer

pytestmark = pytest.mark.long

discover("plugins")
# Two levels instead of three, because compilation dominates. Eight samples per step, five steps per epoch.
SMALL = ["--training.resolution=16", "--tokenizer.multipliers=[1,2]", "--training.steps=6", "--run.checkpoint_every=0"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    (folder / "toy.toml").write_text(toys.TOML)
    return str(folder / "toy.toml")


def run(rank: int, world: int, toml: str, folder: str, options: list[str]) -> dict:
    with compiled_by_aot_eager():
        torch.set_num_threads(1)
        return finished(Trainer(config.load(toml, [f"--run.dir={folder}", *SMALL, *options]), World(rank, world)))


@pytest.fixture(scope="module")
def eager(toml, tmp_path_factory):
    return run(0, 1, toml, str(tmp_path_factory.mktemp("eager")), [])


def assert_close(eager: dict, compiled: dict) -> None:
    differences = largest_difference(eager, compiled)
    assert max(differences.values()) <= 1e-3, differences


def test_compiled_equals_eager_and_does_not_recompile(toml, tmp_path, eager, monkeypatch):
    """The denoiser has a memory budget. Neither initial statistics nor pictures compile anything."""
    measured = []

    def prepare_latent_norm(*parts):
        initial_statistics.prepare_latent_norm(*parts)
        measured.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(loop, "prepare_latent_norm", prepare_latent_norm)
    options = ["--training.compile", "--sampling.every=3", "--activation_checkpoint.denoiser=budget 0.3"]
    found = run(0, 1, toml, str(tmp_path), options)
    graphs = found["graphs"]
    assert len(graphs) == 6 and graphs[1] > 0
    assert measured == [0] and graphs[1] == graphs[-1], f"graphs compiled after each step: {graphs}"
    assert_close(eager, found)


def test_sharded_recomputing_runs_do_not_recompile_either(toml, tmp_path, eager):
    """With fullgraph, so there are no graph breaks."""
    options = ["--training.compile", "--activation_checkpoint.denoiser=full",
               "--activation_checkpoint.tokenizer=selective"]  # fmt: skip
    for found in run_ranks(run, 2, toml, str(tmp_path), options):
        graphs = found["graphs"]
        assert len(graphs) == 6 and graphs[1] > 0
        assert graphs[1] == graphs[-1], f"graphs compiled after each step: {graphs}"
        assert_close(eager, found)


@pytest.mark.parametrize("recipe", ["repae", "naive_e2e"])
def test_what_is_frozen_in_one_pass_learns_in_the_next(recipe, toml, tmp_path):
    """A graph compiled while parameters were frozen must not be reused in the pass that trains them."""
    rate = [f"--optimizer.{group}lr=1e-6" for group in ("", "tokenizer.", "discriminator.", "denoiser.")]
    loaded = config.load(toml, [f"--run.dir={tmp_path}", *SMALL, f"--recipe.name={recipe}", *rate])
    assert_learns_alike(learn(loaded, None), learn(loaded, "aot_eager"))


def test_stages_of_one_class_get_static_graphs_of_their_own():
    """Without the marks, spatial sizes become symbolic in all stages but the first; the batch size may."""
    seen = []

    def backend(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        maps = [v for v in values if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
        seen.extend(v.shape for v in maps)
        return graph

    m = toys.modules(dtype=torch.float32)
    compile_units(m.tokenizer, backend)
    with torch.no_grad():
        for batch in (2, 3):
            m.tokenizer.decode(m.tokenizer.encode(torch.zeros(batch, 3, 32, 32)).mean)
    assert seen and all(isinstance(side, int) for shape in seen for side in shape[1:])
    assert any(not isinstance(shape[0], int) for shape in seen), "the batch should become symbolic"


def test_inductor_equals_eager(tmp_path):
    """One block of each kind with inductor, the backend of real runs."""
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
