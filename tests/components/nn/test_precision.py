"""bf16 autocast with fp32 islands: weights, gradients, statistics, posterior and losses stay in fp32."""

import pytest
import torch

from components.contracts import Condition
from components.optim.optimizer import ParameterGroup
from components.optim.schedule import Schedule
from components.registry import denoisers, discover, recipes
from plugins.denoisers.sit import TimeEmbedding
from plugins.optimizers.adamw import AdamW
from tests.support import toys
from trainer.run.step import Step

discover("plugins")


def run(autocast_dtype: torch.dtype | None):
    recipe = recipes.get("repae").cls()
    m = toys.modules(dtype=torch.float32)
    for name, module in m.named().items():
        module.requires_grad_(any(name in members for members in recipe.trains.values()))
    groups = {
        name: ParameterGroup(name, {part: getattr(m, part) for part in parts}, AdamW, schedule=Schedule(1e-4))
        for name, parts in recipe.trains.items()
    }
    step = Step(recipe, m, groups, ema=None, accumulation=1, autocast_dtype=autocast_dtype,
                device=torch.device("cpu"))  # fmt: skip
    dtypes, update = {}, step._update

    def watched(group, terms, **extra):
        values = {name: value for name, (_, value) in terms.items()} | extra
        dtypes.update({f"{group}/{name}": value.dtype for name, value in values.items()})
        update(group, terms, **extra)

    step._update = watched
    read = step(0, [toys.batch(dtype=torch.float32)]).read()
    assert read["skipped_steps"] == 0
    return m, read, dtypes


def test_bf16_step_is_close_to_fp32_and_keeps_its_islands():
    _, exact, _ = run(None)
    m, rounded, dtypes = run(torch.bfloat16)
    for name in exact:
        assert rounded[name] == pytest.approx(exact[name], rel=0.1, abs=0.05), name
    assert rounded["tokenizer/l1"] != exact["tokenizer/l1"], "nothing was computed in bf16"
    low = {name: dtype for name, dtype in dtypes.items() if dtype in (torch.bfloat16, torch.float16)}
    assert not low, f"losses and norms in low precision: {low}"
    assert all(p.dtype == torch.float32 for module in m.named().values() for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        posterior = m.tokenizer.encode(toys.batch(dtype=torch.float32)[0].images)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


def test_times_near_one_stay_apart_in_bf16():
    """bf16 itself cannot distinguish 0.9991 from 1."""
    embed = TimeEmbedding(16)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = embed(torch.tensor([0.9991, 1.0]), torch.float32)
    assert not torch.equal(a, b)
    assert torch.tensor(0.9991).bfloat16() == 1


DENOISERS = {
    "meanflow_sit": {"width": 32, "depth": 2, "heads": 2, "align_depth": 1},
    "sit": {"width": 32, "depth": 2, "heads": 2, "align_depth": 1},
    "lightningdit": {"width": 32, "depth": 2, "heads": 2, "align_depth": 1},
    "jit": {"width": 32, "depth": 2, "heads": 2, "align_depth": 1, "patch_size": 2, "context_start": 1},
    "ditdh": {
        "width": 32, "depth": 2, "heads": 2, "align_depth": 1, "head_width": 32, "head_depth": 1, "head_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [d.name for d in denoisers])
def test_the_residual_stream_is_fp32_and_contiguous(name):
    """Under bf16 autocast every block adds to fp32 tokens, as in the published code, in the tokens' own layout."""
    network = denoisers.get(name).cls(toys.LATENT, toys.CLASSES, **DENOISERS[name])
    streams = []
    for block in network.units():
        block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, *toys.LATENT), torch.rand(2), Condition(torch.tensor([1, 2])))
    assert len(streams) == len(network.units())
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in streams)
    assert out.tokens.dtype == torch.float32
    low = network.to(torch.bfloat16)  # a network in bf16 without autocast stays in bf16
    assert (
        low(torch.randn(2, *toys.LATENT).bfloat16(), torch.rand(2), Condition(torch.tensor([1, 2]))).tokens.dtype
        == torch.bfloat16
    )
