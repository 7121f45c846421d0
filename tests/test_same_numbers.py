"""The same TOML gives the same numbers whatever it runs on: ranks, strategies, recomputation, accumulation, compiler.

Every comparison is with one process, eager, without any of it; `pytest -s` prints the differences.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests import toys
from tests.ranks import run_ranks

STEPS = 2
FP64 = ["--training.precision=fp64", f"--training.steps={STEPS}", "--ema.tokenizer", "--run.async_checkpoints=false"]
FROZEN_NORMS = ["--recipe.name=repa"]


def runs(rank: int, world: int, toml: str, folder: str, variants: dict[str, list[str]]) -> dict[str, dict]:
    """Trains each variant; what it measured at every step, its weights, averages and buffers, whole."""
    from components.parallel import World, local
    from components.registry import discover
    from trainer import config, loop
    from trainer.loop import Trainer

    discover("plugins")
    torch.set_num_threads(1)
    prepare_for_cpu()
    found = {}
    for name, options in variants.items():
        bf16 = "bf16" in name
        patched(bf16)
        trainer = Trainer(config.load(toml, [f"--run.dir={folder}/{world}-{name}", *options]), World(rank, world))
        steps, seen = watched(trainer)
        trainer.saves.save = lambda step: None  # for time; other tests resume
        trainer.run()
        modules = trainer.parts.modules.named() | {f"ema.{n}": m for n, m in trainer.ema.modules.items()}
        weights = {
            f"{n}.{bare(key)}": (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for n, m in modules.items()
            for key, p in m.named_parameters()
        }
        buffers = {f"{n}.{bare(key)}": b.clone() for n, m in modules.items() for key, b in m.named_buffers()}
        largest = max(trainer.parts.modules.denoiser.parameters(), key=lambda p: p.numel())
        found[name] = {
            "steps": steps,
            "seen": seen,
            "weights": weights,
            "buffers": buffers,
            "held": local(largest).numel() / largest.numel(),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    assert loop is not None
    return found


def watched(trainer) -> tuple[list[dict], list[tuple]]:
    """Lists that will hold what each step measured, and the images and noise that this rank saw."""
    steps, seen, observe, step = [], [], trainer.watch.observe, trainer.parts.recipe.step

    def observed(record, values, *rest):
        steps.append(dict(values))
        return observe(record, values, *rest)

    def stepped(m, batch, draws, update, k):
        for image, noise in zip(batch.images, draws.noise):
            seen.append((k, image.double().sum().item(), noise.double().sum().item()))
        step(m, batch, draws, update, k)

    trainer.watch.observe = observed
    trainer.parts.recipe.step = stepped
    return steps, seen


def prepare_for_cpu() -> None:
    """aot_eager traces as inductor does, in a fraction of its time."""
    from components import parallel

    original = getattr(parallel.compile_units, "original", parallel.compile_units)

    def compile_units(module, backend="inductor"):
        original(module, "aot_eager")

    compile_units.original = original
    parallel.compile_units = compile_units


def bare(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def patched(bf16: bool) -> None:
    """bf16 on a CPU, where the config's "bf16" means fp32."""
    from trainer import loop, prepare

    prepare.autocast_dtype = loop.autocast_dtype = lambda config, device: torch.bfloat16 if bf16 else None


def largest_difference(a: dict, b: dict, skip: tuple[str, ...] = ()) -> dict[str, float]:
    """Relative differences: of the losses and norms of all steps, of all weights, of all buffers."""
    found = {"losses": 0.0, "weights": 0.0, "buffers": 0.0}
    assert len(a["steps"]) == len(b["steps"]) == STEPS
    for ours, theirs in zip(a["steps"], b["steps"]):
        assert ours.keys() == theirs.keys()
        for name in ours:
            difference = abs(ours[name] - theirs[name]) / max(abs(ours[name]), 1e-3)
            found["losses"] = max(found["losses"], difference)
    for kind in ("weights", "buffers"):
        assert a[kind].keys() == b[kind].keys()
        for name, tensor in a[kind].items():
            if tensor.is_floating_point() and not name.startswith(skip):
                difference = (tensor - b[kind][name]).abs().max() / tensor.abs().max().clamp_min(1e-3)
                found[kind] = max(found[kind], difference.item())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    toml = folder / "toy.toml"
    toml.write_text(toys.TOML)
    fp32 = [o for o in FP64 if "precision" not in o]
    ac = "--activation_checkpoint.denoiser={0}|--activation_checkpoint.tokenizer={0}"
    plans = {
        1: {
            "plain": FP64,
            "recompute every 2": [*FP64, *ac.format("every 2").split("|")],
            "recompute selective": [*FP64, *ac.format("selective").split("|")],
            "frozen norms": [*FP64, *FROZEN_NORMS],
            "frozen norms, accumulation": [*FP64, *FROZEN_NORMS, "--training.accumulation=4"],
            "fp32": fp32,
            "fp32 compiled, recompute budget": [*fp32, "--training.compile", *ac.format("budget 0.3").split("|")],
            "bf16": fp32,
        },
        2: {
            "fsdp": FP64,
            "fsdp, no reshard, offloaded": [
                *FP64, "--parallel.reshard_after_forward=false", "--parallel.cpu_offload",
            ],
            "fsdp, frozen parts shared out": [*FP64, "--parallel.shard_frozen"],
            "fsdp, recompute full": [*FP64, *ac.format("full").split("|")],
            "ddp": [*FP64, "--parallel.strategy=ddp"],
            "frozen norms, accumulation": [*FP64, *FROZEN_NORMS, "--training.accumulation=2"],
            "fp32 fsdp compiled, recompute full": [*fp32, "--training.compile", *ac.format("full").split("|")],
            "bf16 fsdp": fp32,
        },
        4: {
            "fsdp": FP64,
            "hsdp": [*FP64, "--parallel.strategy=hsdp", "--parallel.shard=2"],
        },
    }  # fmt: skip
    return {w: run_ranks(runs, w, str(toml), str(folder), plan, timeout_s=300.0) for w, plan in plans.items()}


# Adam's first steps have the size of the learning rate whatever the gradient's: where rounding to bf16 decides a
# sign, weights that began at zero differ by all that they have moved.
ADAM = 1.0

CASES = [
    # world, variant, reference, tolerances of losses and of weights
    (1, "recompute every 2", "plain", 1e-12, 1e-12),
    (1, "recompute selective", "plain", 1e-12, 1e-12),
    (1, "frozen norms, accumulation", "frozen norms", 1e-10, 1e-9),
    (1, "fp32 compiled, recompute budget", "fp32", 1e-3, 1e-3),
    (2, "fsdp", "plain", 1e-8, 1e-8),
    (2, "fsdp, no reshard, offloaded", "plain", 1e-8, 1e-8),
    (2, "fsdp, frozen parts shared out", "plain", 1e-8, 1e-8),
    (2, "fsdp, recompute full", "plain", 1e-8, 1e-8),
    (2, "ddp", "plain", 1e-8, 1e-8),
    (2, "frozen norms, accumulation", "frozen norms", 1e-8, 1e-8),
    (2, "fp32 fsdp compiled, recompute full", "fp32", 1e-3, 1e-3),
    (2, "bf16 fsdp", "bf16", 5e-2, ADAM),
    (4, "fsdp", "plain", 1e-8, 1e-8),
    (4, "hsdp", "plain", 1e-8, 1e-8),
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
    assert held[2, "fsdp"] == 0.5 and held[4, "fsdp"] == 0.25 and held[4, "hsdp"] == 0.5
    assert held[2, "ddp"] == 1


@pytest.mark.parametrize(("world", "variant"), [(2, "ddp"), (4, "fsdp"), (4, "hsdp")])
def test_the_ranks_share_the_samples_and_the_noise_of_one_process(results, world, variant):
    """Together all of them, and no two the same."""
    one = results[1][0]["plain"]["seen"]
    shared = [item for found in results[world] for item in found[variant]["seen"]]
    assert len(one) == STEPS * 8 and sorted(one) == sorted(shared)
    noise = [(k, e) for k, _, e in shared]
    assert len(set(noise)) == len(noise)


def test_the_comparison_sees_a_difference(results):
    """One weight off by a millionth part of the largest must not pass."""
    a = results[1][0]["plain"]
    b = copy.deepcopy(a)
    name = next(n for n in b["weights"] if n.startswith("denoiser.blocks.0.attn.qkv.weight"))
    b["weights"][name][0, 0] += 1e-6
    assert largest_difference(a, b)["weights"] > 1e-8
