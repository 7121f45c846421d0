"""Which loss reaches which module: in every recipe, each module learns from its own losses and no others."""

import contextlib

import pytest
import torch

from components.contracts import Batch, Condition
from components.distributed.freeze import frozen
from components.registry import discover, recipes
from tests.support import toys
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.long

discover("plugins")
RECIPES = ["repae", "repa", "ldm", "naive_e2e", "tokenizer"]
# Recipes that need parts of another kind; their own tests cover this.
ELSEWHERE = {"reg": "test_reg.py", "rae_decoder": "test_rae.py", "sra": "test_sra.py", "meanflow": "test_meanflow.py"}


def gradients(recipe_name: str, only: str | None):
    """Run one step of a recipe and backpropagate the update of one group, or of all; return gradients by module."""
    recipe = recipes.get(recipe_name).cls()
    m = toys.modules()
    for name, module in m.named().items():
        module.requires_grad_(any(name in members for members in recipe.trains.values()))

    def update(group, terms, **extra):
        if only in (None, group):
            sum(weight * value for weight, value in terms.values()).backward()

    recipe.step(m, *toys.batch(), update, step=0)
    found = {name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in m.named().items()}
    return recipe, {name: grads for name, grads in found.items() if any(g.any() for g in grads)}


def test_every_recipe_is_covered():
    assert sorted([*RECIPES, *ELSEWHERE]) == [
        r.name for r in recipes if r.file.startswith(str(toys.__file__).rsplit("/tests", 1)[0])
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_each_update_reaches_its_own_group_only(name):
    recipe, _ = gradients(name, only=None)
    for group, members in recipe.trains.items():
        _, reached = gradients(name, only=group)
        assert set(reached) == set(members), f"the update of '{group}'"


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_a_step_are_those_of_the_single_updates(name):
    recipe, together = gradients(name, only=None)
    for group, members in recipe.trains.items():
        _, alone = gradients(name, only=group)
        for member in members:
            assert all(torch.equal(a, b) for a, b in zip(together[member], alone[member]))


@pytest.mark.parametrize(
    ("name", "options", "reaches"),
    [("repae", {}, False), ("repae", {"stop_gradient": False}, True), ("naive_e2e", {}, True)],
)
def test_the_diffusion_loss_reaches_the_tokenizer_only_where_asked(name, options, reaches):
    recipe = recipes.get(name).cls(**options)
    m = toys.modules()
    touched = []

    def update(group, terms, **extra):
        for term, (_, value) in terms.items():
            if term == "velocity":
                grads = torch.autograd.grad(value, list(m.tokenizer.parameters()), allow_unused=True, retain_graph=True)
                touched.append(any(g is not None and g.any() for g in grads))

    recipe.step(m, *toys.batch(), update, step=0)
    assert any(touched) == reaches


def test_the_alignment_pass_leaves_the_latent_statistics_alone():
    """REPA-E: the tokenizer's pass normalizes with running statistics; the denoiser's pass updates them, once."""
    m = toys.modules()
    recipes.get("repae").cls().step(m, *toys.batch(), lambda *a, **k: None, step=0)
    assert m.latent_norm.num_batches_tracked.item() == 1


def test_frozen_restores_what_it_found_after_an_error():
    m = toys.modules()
    m.denoiser.blocks[0].requires_grad_(False)
    before = [p.requires_grad for p in m.denoiser.parameters()]
    with pytest.raises(RuntimeError), frozen(m.denoiser, None):
        assert not any(p.requires_grad for p in m.denoiser.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in m.denoiser.parameters()] == before


def test_what_wrapped_methods_return_shows_its_tensors_to_fsdp():
    """FSDP2 finds the tensors for its backward hooks in tuples, lists and dicts; torch 2.11 supports nothing else."""
    m = toys.modules(dtype=torch.float32)
    batch, _ = toys.batch(dtype=torch.float32)
    posterior = m.tokenizer.encode(batch.images)
    out = m.denoiser(posterior.mean, torch.rand(4), batch.condition)
    for record in (posterior, out):
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(record) if leaf is not None]
        assert len(leaves) == 2 and all(leaf.requires_grad for leaf in leaves)


def flops_of_a_step(rank: int, world: int, shape: tuple[int, int]) -> int:
    """Return the floating-point operations of one REPA-E step on this rank's share of eight images."""
    from torch.utils.flop_counter import FlopCounterMode

    from components.distributed import parallel

    recipe, m = recipes.get("repae").cls(), toys.modules()
    for name, module in m.named().items():
        module.requires_grad_(any(name in members for members in recipe.trains.values()))
    if world > 1:
        sharding = parallel.Sharding(parallel.make_mesh("cpu", shape))
        parallel.shard(m.tokenizer, sharding)
        parallel.shard(m.denoiser, sharding)
        for part in (*m.heads, m.discriminator):
            parallel.shard(part, sharding)
    batch, draws = toys.batch(size=8)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)

    def update(group, terms, **extra):
        sum(weight * value for weight, value in terms.values()).backward()

    with FlopCounterMode(display=False) as counter:
        part = Batch(batch.images[share], Condition(batch.condition.label[share]))
        recipe.step(m, part, {name: x[share] for name, x in draws.items()}, update, 0)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_sharded_ranks_compute_no_more_than_one_process(shape, monkeypatch):
    """The frozen passes skip weight gradients under FSDP2, too; with them there would be more operations."""
    (alone,) = run_ranks(flops_of_a_step, 1, (1, 1))
    assert sum(run_ranks(flops_of_a_step, 2, shape)) == alone
    monkeypatch.setattr("plugins.recipes.repae.frozen", lambda *modules: contextlib.nullcontext())
    assert flops_of_a_step(0, 1, (1, 1)) > 1.02 * alone


def test_a_fixed_latent_norm_keeps_its_statistics():
    """The paper's ablation without batch norm: every pass normalizes with the initial statistics."""
    m = toys.modules()
    m.latent_norm.set_statistics(torch.arange(1.0, 5), torch.arange(2.0, 6))
    m.latent_norm.fixed, before = True, {k: v.clone() for k, v in m.latent_norm.state_dict().items()}
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.equal(m.latent_norm.batch(z), m.latent_norm(z))
    recipes.get("repae").cls().step(m, *toys.batch(), lambda *a, **k: None, step=0)
    assert all(torch.equal(v, before[k]) for k, v in m.latent_norm.state_dict().items())
