"""One TOML produces the same numbers for any ranks, strategies, activation checkpointing and accumulation.

Every variant is compared with one plain process; `pytest -s` prints the differences. Compiled: test_compile.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import finished, largest_difference

pytestmark = pytest.mark.long

STEPS = 2
FP64 = ["--training.precision=fp64", f"--training.steps={STEPS}", "--ema.tokenizer", "--run.async_checkpoints=false"]
FROZEN_NORMS = ["--recipe.name=repa"]
MUON = ["--optimizer.name=muon"]


def runs(rank: int, world: int, toml: str, folder: str, variants: dict[str, list[str]]) -> dict[str, dict]:
    """Train each variant; return the results of :func:`tests.support.runs.finished`."""
    from components.distributed.parallel import World
    from components.registry import discover
    from trainer import config
    from trainer.run import prepare
    from trainer.run.loop import Trainer

    discover("plugins")
    torch.set_num_threads(1)
    found = {}
    for name, options in variants.items():
        # bf16 on any CPU: the config's "bf16" means fp32 on those without AMX.
        dtype = torch.bfloat16 if "bf16" in name else None
        prepare.autocast_dtype = lambda config, device, dtype=dtype: dtype
        found[name] = finished(
            Trainer(config.load(toml, [f"--run.dir={folder}/{world}-{name}", *options]), World(rank, world))
        )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    toml = folder / "toy.toml"
    toml.write_text(toys.TOML)
    fp32 = [o for o in FP64 if "precision" not in o]
    ac = "--activation_checkpoint.denoiser={0}|--activation_checkpoint.tokenizer={0}"
    # Few variants, each with several independent options, because a variant costs two seconds per rank.
    plans = {
        1: {
            "plain": FP64,
            "recompute every 2": [*FP64, *ac.format("every 2").split("|")],
            "recompute selective": [*FP64, *ac.format("selective").split("|")],
            "frozen norms": [*FP64, *FROZEN_NORMS],
            "frozen norms, accumulation": [*FP64, *FROZEN_NORMS, "--training.accumulation=4"],
            "diffusion loss into the tokenizer": [*FP64, "--recipe.name=naive_e2e"],
            "bf16": fp32,
            "muon": [*FP64, *MUON],
        },
        2: {
            "fsdp": FP64,
            "fsdp, no reshard, offloaded": [
                *FP64, "--parallel.reshard_after_forward=false", "--parallel.cpu_offload",
            ],
            "fsdp, frozen parts shared out, recompute full": [
                *FP64, "--parallel.shard_frozen", *ac.format("full").split("|"),
            ],
            "ddp": [*FP64, "--parallel.strategy=ddp"],
            "ddp, offloaded": [*FP64, "--parallel.strategy=ddp", "--parallel.cpu_offload"],
            "frozen norms, accumulation": [*FP64, *FROZEN_NORMS, "--training.accumulation=2"],
            "diffusion loss into the tokenizer": [*FP64, "--recipe.name=naive_e2e"],
            "bf16 fsdp": fp32,
            "muon, fsdp, offloaded": [*FP64, *MUON, "--parallel.cpu_offload"],
            "muon, ddp": [*FP64, *MUON, "--parallel.strategy=ddp"],
        },
        4: {
            "hsdp": [*FP64, "--parallel.strategy=hsdp", "--parallel.shard=2"],
            "muon, hsdp": [*FP64, *MUON, "--parallel.strategy=hsdp", "--parallel.shard=2"],
            "muon, fsdp": [*FP64, *MUON],
        },
    }  # fmt: skip
    return {w: run_ranks(runs, w, str(toml), str(folder), plan, timeout_s=300.0) for w, plan in plans.items()}


# Adam's first steps have the size of the learning rate for any gradient: where bf16 rounding flips a sign, weights
# initialized to zero differ by as much as they have moved.
ADAM = 1.0

CASES = [
    # world size, variant, reference, tolerances of losses and of weights
    (1, "recompute every 2", "plain", 1e-12, 1e-12),
    (1, "recompute selective", "plain", 1e-12, 1e-12),
    (1, "frozen norms, accumulation", "frozen norms", 1e-10, 1e-9),
    (2, "fsdp", "plain", 1e-8, 1e-8),
    (2, "fsdp, no reshard, offloaded", "plain", 1e-8, 1e-8),
    (2, "fsdp, frozen parts shared out, recompute full", "plain", 1e-8, 1e-8),
    (2, "ddp", "plain", 1e-8, 1e-8),
    (2, "ddp, offloaded", "plain", 1e-8, 1e-8),
    (2, "frozen norms, accumulation", "frozen norms", 1e-8, 1e-8),
    # This recipe backpropagates through two sharded modules at once.
    (2, "diffusion loss into the tokenizer", "diffusion loss into the tokenizer", 1e-8, 1e-8),
    (2, "bf16 fsdp", "bf16", 5e-2, ADAM),
    (4, "hsdp", "plain", 1e-8, 1e-8),
    (2, "muon, fsdp, offloaded", "muon", 1e-8, 1e-8),
    (2, "muon, ddp", "muon", 1e-8, 1e-8),
    (4, "muon, hsdp", "muon", 1e-8, 1e-8),
    (4, "muon, fsdp", "muon", 1e-8, 1e-8),
]


@pytest.mark.parametrize(("world", "variant", "reference", "losses", "weights"), CASES)
def test_equals_one_plain_process(results, world, variant, reference, losses, weights):
    expected = results[1][0][reference]
    for rank, found in enumerate(results[world]):
        differences = largest_difference(expected, found[variant])
        print(f"{world} ranks, {variant}: {differences}")
        assert differences["losses"] <= losses, f"rank {rank}: {differences}"
        assert max(differences["weights"], differences["buffers"]) <= weights, f"rank {rank}: {differences}"


@pytest.mark.parametrize("world", [2, 4])
def test_every_buffer_is_the_same_on_all_ranks(results, world):
    for variant, first in results[world][0].items():
        for other in results[world][1:]:
            for name, buffer in first["buffers"].items():
                assert torch.equal(buffer, other[variant]["buffers"][name]), f"{variant}: {name}"
        assert any("pos_embed" in name for name in first["buffers"])


def test_each_rank_holds_its_part_and_no_more(results):
    held = {(w, v): found["held"] for w in (2, 4) for v, found in results[w][0].items()}
    assert held[2, "fsdp"] == 0.5 and held[4, "hsdp"] == 0.5
    assert held[2, "ddp"] == 1


@pytest.mark.parametrize(("world", "variant"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_the_ranks_share_the_samples_and_the_noise_of_one_process(results, world, variant):
    """Together all of them, with no duplicates."""
    one = results[1][0]["plain"]["seen"]
    shared = [item for found in results[world] for item in found[variant]["seen"]]
    assert len(one) == STEPS * 8 and sorted(one) == sorted(shared)
    noise = [(k, e) for k, _, e in shared]
    assert len(set(noise)) == len(noise)


def test_the_comparison_sees_a_difference(results):
    """One weight that is off by a millionth of the largest must be detected."""
    a = results[1][0]["plain"]
    b = copy.deepcopy(a)
    name = next(n for n in b["weights"] if n.startswith("denoiser.blocks.0.attn.qkv.weight"))
    b["weights"][name][0, 0] += 1e-6
    assert largest_difference(a, b)["weights"] > 1e-8
