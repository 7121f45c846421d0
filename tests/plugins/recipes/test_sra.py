"""SRA (arXiv 2505.02831): its losses and gradients, its teacher, resuming, ranks, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from components.contracts import Batch, Modules, RandomNumbers
from components.diffusion.random_numbers import draw
from components.distributed.parallel import World
from components.optim.ema import frozen_copy
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from components.registry import discover
from plugins.losses.smooth_l1 import SmoothL1
from plugins.optimizers.adamw import AdamW
from plugins.recipes.sra import Sra
from tests.support import toys
from tests.support.ranks import run_ranks
from tests.support.runs import finished, largest_difference
from trainer import config
from trainer.config import ConfigError
from trainer.run import assemble
from trainer.run.loop import Trainer
from trainer.run.step import Step

torch.set_num_threads(1)
discover("plugins")
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def modules() -> Modules:
    """The toys with two aligned blocks, and a teacher that differs from the denoiser."""
    m = toys.modules()
    m.denoiser.align_depth = [1, 3]
    m.alignment = SmoothL1()
    m.heads = m.alignment.make_heads(32, Sra().head_dims(m), 4).double()
    m.copies["teacher"] = frozen_copy(m.denoiser)
    for p in m.copies["teacher"].parameters():
        p.mul_(1.1)
    for name in ("tokenizer", "latent_norm"):
        getattr(m, name).eval().requires_grad_(False)
    return m


def batch(m: Modules, step: int = 0, size: int = 4) -> tuple[Batch, RandomNumbers]:
    numbers = draw(0, step, range(size), size, Sra().random_numbers(m, toys.LATENT))
    return toys.batch(step, size)[0], {name: x.double() for name, x in numbers.items()}


def terms_of(m: Modules, recipe: Sra, given: tuple[Batch, RandomNumbers], step: int = 0) -> dict:
    found = {}
    recipe.step(m, *given, lambda group, terms: found.update(terms), step)
    return found


def block_outputs(denoiser, x_t, t, condition) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The velocity, and the output of every block."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in denoiser.blocks]
    velocity = denoiser(x_t, t, condition).velocity
    for hook in hooks:
        hook.remove()
    return velocity, outputs


# -- one step ----------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_formula():
    m = modules()
    images, random = batch(m)
    random["interval"][0], random["time"][0] = 0.9, 0.05  # a negative time becomes 0
    random["label"][1] = 0.0  # dropped, for both
    found = terms_of(m, Sra(max_interval=0.5), (images, random))

    posterior = m.tokenizer.encode(images.images)
    z = m.latent_norm(posterior.mean + posterior.std * random["posterior"])
    t, e = random["time"], random["noise"]
    s = torch.stack([max(a - 0.5 * k, torch.zeros((), dtype=a.dtype)) for a, k in zip(t, random["interval"])])
    assert s[0] == 0 and (s[1:] < t[1:]).all()
    label = torch.where(random["label"] < 0.1, 10, images.condition.label)
    assert label[1] == 10 and not (label == 10).all()
    condition = images.condition._replace(label=label)

    def x_at(t: torch.Tensor) -> torch.Tensor:
        return (1 - t)[:, None, None, None] * z + t[:, None, None, None] * e

    velocity, tokens = block_outputs(m.denoiser, x_at(t), t, condition)
    _, targets = block_outputs(m.copies["teacher"], x_at(s), s, condition)
    head = m.heads[0]
    hidden = tokens[0] @ head.linear1.weight.T + head.linear1.bias
    projected = (hidden * hidden.sigmoid()) @ head.linear2.weight.T + head.linear2.bias
    d = (projected - targets[2]).abs()
    align = torch.where(d < 0.05, d.square() / (2 * 0.05), d - 0.05 / 2).mean()
    assert (d < 0.05).any() and (d > 0.05).any()

    assert {name: term.weight for name, term in found.items()} == {"velocity": 1.0, "align": 0.2}
    torch.testing.assert_close(found["velocity"].value, (velocity - (e - z)).square().mean(), **CLOSE)
    torch.testing.assert_close(found["align"].value, align, **CLOSE)


def test_the_teacher_gets_no_gradient_and_later_blocks_none_from_the_alignment():
    m = modules()
    terms_of(m, Sra(), batch(m))["align"].value.backward()
    assert all(p.grad is None for p in m.copies["teacher"].parameters())
    reached = [any(p.grad is not None for p in block.parameters()) for block in m.denoiser.blocks]
    assert reached == [True, False, False]
    assert all(p.grad.any() for p in m.heads.parameters())


def test_without_strength_the_teacher_does_not_run():
    m = modules()
    m.alignment.strength = lambda step: 0.0
    m.copies["teacher"].tokens = None
    assert terms_of(m, Sra(), batch(m)).keys() == {"velocity"}


def test_cached_latents_have_the_same_losses():
    m = modules()
    images, random = batch(m)
    cached = Batch(None, images.condition, m.tokenizer.encode(images.images), {})
    a, b = terms_of(m, Sra(), (images, random)), terms_of(m, Sra(), (cached, random))
    assert all(torch.equal(a[name].value, b[name].value) for name in a)


# -- the teacher -------------------------------------------------------------------------------------------------


def make_step(m: Modules, recipe: Sra) -> Step:
    members = {"denoiser": m.denoiser, "heads": m.heads}
    groups = {"denoiser": ParameterGroup("denoiser", members, AdamW, schedule=Schedule(1e-2))}
    return Step(recipe, m, groups, ema=None, accumulation=1, autocast_dtype=None, device=torch.device("cpu"))


def test_the_teacher_is_the_average_of_the_denoisers_weights():
    m = modules()
    step = make_step(m, Sra(decay=0.7))
    expected = {name: p.clone() for name, p in m.copies["teacher"].named_parameters()}
    for k in range(4):
        step(k, [batch(m, k)])
        for name, p in m.denoiser.named_parameters():
            expected[name] = 0.7 * expected[name] + 0.3 * p.detach()
    for name, p in m.copies["teacher"].named_parameters():
        torch.testing.assert_close(p, expected[name], **CLOSE)
        assert not torch.equal(p, dict(m.denoiser.named_parameters())[name])


def test_a_skipped_step_leaves_the_teacher():
    m = modules()
    step = make_step(m, Sra(decay=0.7))
    step(0, [batch(m, 0)])
    before = [p.clone() for p in m.copies["teacher"].parameters()]
    images, random = batch(m, 1)
    poisoned = images._replace(images=images.images * math.nan)
    assert step(1, [(poisoned, random)]).read()["skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, m.copies["teacher"].parameters()))
    assert step(2, [batch(m, 2)]).read()["skipped_steps"] == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, m.copies["teacher"].parameters()))


# -- runs --------------------------------------------------------------------------------------------------------

SRA = ["--recipe.name=sra", "--recipe.decay=0.7", "--denoiser.align_depth=[1,2]"]
RUN = ["--training.precision=fp64", "--run.async_checkpoints=false", "--optimizer.lr=3e-3", *SRA]


@pytest.fixture
def toml(tmp_path) -> str:
    (tmp_path / "toy.toml").write_text(toys.TOML.replace("[losses.cosine]\nhead_width = 32", "[losses.smooth_l1]"))
    return str(tmp_path / "toy.toml")


def load(toml: str, *options: str) -> config.Config:
    return config.load(toml, [*SRA, *options])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--denoiser.align_depth=1", ["align_depth = 1", "'sra'", "[8, 20]"]),
        ("--denoiser.align_depth=[1]", ["align_depth = [1]", "'sra'", "[8, 20]"]),
        ("--denoiser.align_depth=[2,1]", ["align_depth = [2, 1]", "increasing"]),
        ("--recipe.decay=1.0", ["recipe.decay = 1.0", "[0, 1)"]),
        ("--recipe.max_interval=-0.1", ["recipe.max_interval = -0.1", "[0, 1]"]),
        ("--losses.smooth_l1.beta=0.0", ["losses.smooth_l1", "beta = 0.0", "positive"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(toml, option, said):
    with pytest.raises(ConfigError) as refusal:
        assemble.check(load(toml, option), 1)
    assert all(text in str(refusal.value) for text in said), refusal.value


def test_takes_any_alignment_loss_and_has_one_head(tmp_path):
    (tmp_path / "toy.toml").write_text(toys.TOML)
    m = assemble.check(load(str(tmp_path / "toy.toml")), 1).modules
    assert type(m.alignment).__name__ == "Cosine" and len(m.heads) == 1 and not m.encoders
    assert m.heads[0][-1].out_features == m.denoiser.width


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that the next step depends on, by its path in the checkpoint."""
    found = {}

    def walk(path: str, value) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}/{key}", item)
        elif isinstance(value, torch.Tensor):
            found[path] = value.detach().clone()

    walk("", trainer.state())
    return found


@pytest.mark.long
def test_resumes_exactly(toml, tmp_path):
    """Weights, teacher and losses equal those of the uninterrupted run."""

    def train(folder: str, *options: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        trainer = Trainer(load(toml, f"--run.dir={tmp_path}/{folder}", *RUN, *options), World())
        losses, observe = [], trainer.watch.observe

        def observed(record, values, *rest):
            losses.append(dict(values))
            return observe(record, values, *rest)

        trainer.watch.observe = observed
        trainer.run()
        return losses, whole_state(trainer)

    losses, state = train("whole", "--training.steps=5")
    first, middle = train("parts", "--training.steps=3")
    second, resumed = train("parts", "--training.steps=5")
    assert losses == first + second and len(second) == 2
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[name], resumed[name]) for name in state)
    teacher = [name for name in state if name.startswith("/recipe/copies/teacher/") and "qkv.weight" in name]
    assert teacher and not any(torch.equal(state[name], middle[name]) for name in teacher)


def trained(rank: int, world: int, toml: str, options: list[str]) -> dict:
    discover("plugins")
    options = ["--training.steps=3", f"--run.dir={Path(toml).parent}/{world}", *RUN, *options]
    return finished(Trainer(load(toml, *options), World(rank, world)))


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [[], ["--activation_checkpoint.denoiser=full", "--parallel.reshard_after_forward=false"]],
    ids=["default", "recomputed-gathered"],
)
def test_two_ranks_are_one_run(toml, options):
    one = trained(0, 1, toml, [])
    assert {"denoiser/velocity", "denoiser/align"} <= one["steps"][0].keys()
    assert any(name.startswith("copies.teacher.") for name in one["weights"])
    for found in run_ranks(trained, 2, toml, options):
        differences = largest_difference(one, found)
        print(differences)
        assert max(differences.values()) < 1e-8 and found["held"] == 0.5


@pytest.mark.long
def test_recipes_without_copies_keep_their_checkpoints(toml, tmp_path):
    """They have no entry "recipe", so that checkpoints from before copies and state existed load unchanged."""
    options = [f"--run.dir={tmp_path}/ldm", "--training.steps=1", "--recipe.name=ldm", "--denoiser.align_depth=1"]
    trainer = Trainer(config.load(toml, options), World())
    trainer.run()
    keys = {"modules", "ema", "optimizers", "progress", "config", "version", "classes", "troubles"}
    assert trainer.state().keys() == keys
    assert trainer.state()["modules"].keys() == {"tokenizer", "denoiser", "latent_norm"}
    again = Trainer(config.load(toml, options), World())
    assert again.resume() and again.step == 1
