"""benchmarks/plain_step.py is a fair baseline: it computes the same as the project's step, in float64 to 1e-9.

Three steps from the same weights, images and random numbers: every loss, gradient norm, weight, running statistic and
average.
"""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import plain_step
from benchmarks.plain_step import PlainSecondStage, PlainStep, Random
from components.contracts import Modules, Posterior
from components.optim.ema import Ema
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from plugins.losses.lpips import LPIPS
from plugins.optimizers.adamw import AdamW
from plugins.recipes.repa import Repa
from plugins.recipes.repae import RepaE
from tests.support import toys
from trainer.run.step import Step

pytestmark = pytest.mark.long

# 1 - DECAY is exact in float32, to which the EMA rounds it.
LR, DECAY, STEPS = 1e-3, 0.875, 3
SETTINGS = SimpleNamespace(lr=LR, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, clip_norm=0.5)


@pytest.fixture
def modules() -> Modules:
    m = toys.modules()
    torch.manual_seed(1)
    lpips = LPIPS(input_range="published").double()
    for p in lpips.parameters():
        torch.nn.init.normal_(p, std=0.05)
    lpips._fill_buffers()
    for layer in lpips.linear:
        layer.weight.abs_()
    m.reconstruction["lpips"] = lpips
    m.latent_norm.set_statistics(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.0, 1.5, 2.0]))
    return m


def project(m: Modules, recipe) -> tuple[Step, Ema]:
    def adamw(modules, lr):
        return AdamW(modules, lr, betas=SETTINGS.betas, weight_decay=SETTINGS.weight_decay)

    groups = {}
    for name, parts in recipe.trains.items():
        members = {part: getattr(m, part) for part in parts}
        groups[name] = ParameterGroup(name, members, adamw, schedule=Schedule(LR), clip_norm=SETTINGS.clip_norm)
    ema = Ema({"denoiser": m.denoiser, "heads": m.heads, "latent_norm": m.latent_norm}, DECAY)
    device = torch.device("cpu")
    return Step(recipe, m, groups, ema=ema, accumulation=1, autocast_dtype=None, device=device), ema


def plain(m: Modules, kind, **options):
    settings = dict.fromkeys(("tokenizer", "discriminator", "denoiser"), SETTINGS)
    return kind(m, settings, ema_decay=DECAY, **options)


def numbers(draws) -> Random:
    draws["label"][0] = 0.05  # at least one label is dropped
    return Random(draws["posterior"], draws["noise"], draws["time"], draws["label"])


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module, what: str) -> None:
    theirs = theirs.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{what} {n}: {m}")


def compare_weights(ours: Modules, ema: Ema, baseline) -> None:
    assert_equal(ours.denoiser, baseline.model.transformer, "denoiser")
    assert_equal(ours.heads, baseline.model.heads, "heads")
    assert_equal(ours.latent_norm, baseline.norm, "latent norm")
    average, norm = baseline.ema
    assert_equal(ema.modules["denoiser"], average.transformer, "EMA of the denoiser")
    assert_equal(ema.modules["heads"], average.heads, "EMA of the heads")
    assert_equal(ema.modules["latent_norm"], norm, "EMA of the latent norm")


def compare_values(read: dict, seen: dict) -> None:
    assert read["skipped_steps"] == 0
    for name, value in seen.items():
        assert math.isclose(read[name], value, rel_tol=1e-9), f"{name}: {read[name]} and {value}"


def joint_steps(ours: Modules, other: Modules, steps: int, **options) -> None:
    step, ema = project(ours, RepaE())
    baseline = plain(other, PlainStep, **options)
    for k in range(steps):
        batch, draws = toys.batch(k)
        random = numbers(draws)
        read, seen = step(k, [(batch, draws)]).read(), baseline(batch.images, batch.condition.label, random)
        assert {name.split("/")[1] for name in seen if name.startswith("tokenizer/")} == {
            "l1", "kl", "lpips", "gan", "align", "loss",
        }  # fmt: skip
        compare_values(read, seen)
    assert_equal(ours.tokenizer, other.tokenizer, "tokenizer")
    assert_equal(ours.discriminator, other.discriminator, "discriminator")
    compare_weights(ours, ema, baseline)


def test_joint_step_equals_ours(modules):
    joint_steps(modules, copy.deepcopy(modules), STEPS)


def test_compiled_joint_step_equals_ours(modules):
    """Whole modules, each with one graph for the pass with frozen weights and one for the pass that trains them."""
    try:
        joint_steps(modules, copy.deepcopy(modules), 1, compile=True, backend="aot_eager")
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: setattr(m.reconstruction["kl"], "weight", 2e-6),
        lambda m: setattr(m.alignment, "denoiser_weight", 0.51),
        lambda m: setattr(m.latent_norm, "momentum", 0.11),
        lambda m: setattr(m.denoiser, "label_dropout", 0.0),
    ],
    ids=["kl weight", "alignment weight", "momentum", "label dropout"],
)
def test_the_comparison_notices_a_difference(modules, break_it):
    other = copy.deepcopy(modules)
    break_it(other)
    with pytest.raises(AssertionError):
        joint_steps(modules, other, 1)


def test_second_stage_equals_ours(modules):
    other = copy.deepcopy(modules)
    for m in (modules, other):
        m.tokenizer.requires_grad_(False)
    (step, ema), baseline = project(modules, Repa()), plain(other, PlainSecondStage)
    for k in range(STEPS):
        batch, draws = toys.batch(k)
        random = numbers(draws)
        with torch.no_grad():
            posterior = modules.tokenizer.encode(batch.images)
            features = {name: encoder(batch.images) for name, encoder in modules.encoders.items()}
        cached = batch._replace(images=None, posterior=Posterior(posterior.mean, posterior.logvar), features=features)
        read = step(k, [(cached, draws)]).read()
        seen = baseline(posterior.mean, posterior.std, list(features.values()), batch.condition.label, random)
        compare_values(read, seen)
    compare_weights(modules, ema, baseline)


def test_what_it_leaves_out_is_refused(modules):
    modules.discriminator.lecam_weight = 1.0
    modules.alignment.schedule = "cosine"
    with pytest.raises(ValueError, match=r"(?s)without spatial_norm and schedule.*lecam_weight = 0"):
        plain(modules, PlainStep)


@pytest.mark.parametrize("recipe", ["repae", "repa"])
def test_command_times_both_in_turn(tmp_path, capsys, recipe):
    toml, file = tmp_path / "toy.toml", tmp_path / "out.json"
    toml.write_text(toys.TOML)
    options = ["--batch=2", "--rounds=3", "--steps=1", f"--recipe.name={recipe}", "--training.threads=1"]
    assert plain_step.main([str(toml), *options, f"--json={file}"]) == 0
    found = json.loads(file.read_text())
    assert found["batch"] == 2 and len(found["ours"]["ms of each round"]) == 3
    ratios = sorted(b / a for a, b in zip(*(found[name]["ms of each round"] for name in ("ours", "plain"))))
    assert found["ratio"]["median"] == pytest.approx(ratios[1], rel=0.01)
    assert f"plain / ours: {found['ratio']['median']:.2f}" in capsys.readouterr().out


def test_command_names_what_it_cannot_do(tmp_path, capsys):
    toml = tmp_path / "toy.toml"
    toml.write_text(toys.TOML)
    assert plain_step.main([str(toml), "--flow.path=cosine"]) == 2
    assert "[flow]: expected the linear path" in capsys.readouterr().err
    assert plain_step.main([str(toml), "--rounds=0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err
