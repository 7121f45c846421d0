"""A model built once, and training steps at any batch size: the project's and the plain ones; timing functions."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.plain_step import PlainSecondStage, PlainStep
from components.contracts import Batch, Posterior, RandomNumbers, Recipe
from components.diffusion.random_numbers import draw, of_step
from components.distributed.parallel import World
from components.monitor.hardware import peak_tflops
from components.monitor.metrics import TIME
from components.monitor.phases import PhaseClock
from components.nn.group_norm import GroupNorm
from plugins.losses.lpips import LPIPS
from plugins.losses.patchgan import PatchDiscriminator
from plugins.tokenizers.autoencoder_kl import SpatialAttention, Upsample
from trainer.config import Config, PluginTable
from trainer.run.assemble import build, make_ema, parameter_groups
from trainer.run.construct import make_plugin
from trainer.run.parts import Parts
from trainer.run.prepare import autocast_dtype, image_format
from trainer.run.step import Step

Runner = Callable[[], Any]
"""Takes one training step."""


class Workload:
    """Training steps of the project for one config on one device, with random weights.

    Args:
        config: of a run; its batch size, dataset and files are ignored.
        compile: like `training.compile`.
        backend: for torch.compile.
    """

    def __init__(self, config: Config, device: torch.device, compile: bool, backend: str = "inductor") -> None:
        self.config, self.device = with_training(config, compile=compile), device
        self.parts = build(self.config, World(device=device), files=False, backend=backend)
        self.groups, self.ema = parameter_groups(self.config, self.parts), make_ema(self.config, self.parts)

    def step(self, recipe: str | None = None) -> Step:
        """Training step of the config's recipe, or of another recipe on the same networks."""
        chosen = self.parts.recipe if recipe is None else make_plugin("recipe", "recipe", PluginTable(name=recipe))
        return Step(
            chosen,
            self.parts.modules,
            {name: group for name, group in self.groups.items() if name in chosen.trains},
            ema=self.ema,
            accumulation=1,
            device=self.device,
            autocast_dtype=autocast_dtype(self.config, self.device),
            clock=PhaseClock(self.device),
            **image_format(self.config, self.device),
        )

    def batch(self, size: int, recipe: str | None = None) -> tuple[Batch, RandomNumbers]:
        """Random images, or random cached latents and features if the recipe takes them, and random numbers."""
        chosen = self.parts.recipe if recipe is None else make_plugin("recipe", "recipe", PluginTable(name=recipe))
        return random_batch(self.parts, size, self.config, self.device, chosen, chosen.cached_latents)

    def runner(self, size: int, recipe: str | None = None) -> Runner:
        """Function that runs a step as the training loop does: on a GPU it reads each record after the next launch."""
        step, item, counter, unread = self.step(recipe), self.batch(size, recipe), itertools.count(), deque()
        lag = int(self.device.type == "cuda")

        def run() -> dict[str, float]:
            unread.append(step(next(counter), [item]))
            return unread.popleft().read() if len(unread) > lag else {}

        return run

    def clear(self) -> None:
        """Drop gradients left by a step that ran out of memory."""
        for group in self.groups.values():
            group.optimizer.zero_grad(set_to_none=True)


class PlainWorkload:
    """Plain training steps for one config, on separate networks without our fast paths; see :class:`Workload`."""

    def __init__(self, config: Config, device: torch.device, compile: bool, backend: str = "inductor") -> None:
        self.config, self.device = with_training(config, compile=False, channels_last=False), device
        self.parts = build(self.config, World(device=device), files=False)
        for module in self.parts.modules.named().values():
            for part in module.modules():
                if isinstance(part, (LPIPS, PatchDiscriminator)):
                    part.precision = "fp32"
        joint = "tokenizer" in self.parts.recipe.trains
        self.plain = (PlainStep if joint else PlainSecondStage)(
            self.parts.modules,
            {name: config.optimizer.group(name) for name in self.parts.recipe.trains},
            ema_decay=config.ema.decay,
            dtype=autocast_dtype(config, device),
            compile=compile,
            backend=backend,
        )

    def runner(self, size: int) -> Runner:
        cached = isinstance(self.plain, PlainSecondStage)
        batch, _ = random_batch(self.parts, size, self.config, self.device, self.parts.recipe, cached)
        inputs = [batch.images]
        if cached:
            inputs = [batch.posterior.mean, batch.posterior.std, list(batch.features.values())]

        def run() -> dict[str, float]:
            with plain_layers():
                return self.plain(*inputs, batch.condition.label)

        return run


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Context manager in which layers do nothing faster than PyTorch's own, and Inductor has its default settings."""
    before = GroupNorm.fast, SpatialAttention.fast, Upsample.merges
    GroupNorm.fast = SpatialAttention.fast = Upsample.merges = False
    inductor = sys.modules.get("torch._inductor.config")  # not imported only for this
    try:
        with inductor.patch(realize_reads_threshold=4) if inductor else contextlib.nullcontext():
            yield
    finally:
        GroupNorm.fast, SpatialAttention.fast, Upsample.merges = before


def with_training(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def random_batch(
    parts: Parts, size: int, config: Config, device: torch.device, recipe: Recipe, cached: bool
) -> tuple[Batch, RandomNumbers]:
    """Random batch of ``size`` on the device (posteriors and features if ``cached``), with its random numbers."""
    side, latent, m = config.training.resolution, parts.latent, parts.modules
    dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
    labels = torch.arange(size, device=device) % parts.num_classes
    condition = parts.example_condition(size, device)._replace(label=labels)
    drawn = draw(0, 0, range(size), size, of_step(recipe, m, latent))
    random = {name: numbers.to(device) for name, numbers in drawn.items()}
    if not cached:
        return Batch(torch.rand(size, 3, side, side, device=device, dtype=dtype) * 2 - 1, condition), random
    mean, tokens = torch.randn(size, *latent, device=device, dtype=dtype), m.denoiser.grid**2
    features = {
        label: torch.randn(size, tokens, encoder.embed_dim, device=device, dtype=dtype)
        for label, encoder in m.encoders.items()
    }
    return Batch(None, condition, Posterior(mean, torch.full_like(mean, -4.0)), features), random


# -- clocks ------------------------------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Return unused memory to the device; collects garbage first, since compiled modules form reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def milliseconds(run: Runner, device: torch.device, count: int) -> float:
    """Mean milliseconds per call over ``count`` calls back to back."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return (time.perf_counter() - start) / count * 1e3


def median_ms(run: Runner, device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median milliseconds per call, with a synchronization after each."""
    for _ in range(warmup):
        run()
    return median(milliseconds(run, device, 1) for _ in range(repeats))


def alternate(
    ours: Runner, plain: Runner, device: torch.device, rounds: int, steps: int, batch: int, warmup: int = 2
) -> dict[str, Any]:
    """Time two steps alternately, A B A B ..., and compare each pair.

    Returns:
        For "ours" and "plain": seconds of the first call (which compiles), and median, minimum and maximum
        milliseconds per step over the rounds; "ratio": median, minimum and maximum over the pairs of plain / ours.
    """
    first = {}
    for name, run in (("ours", ours), ("plain", plain)):
        first[name] = milliseconds(run, device, 1) / 1e3
        for _ in range(warmup):
            run()
    pairs = [(milliseconds(ours, device, steps), milliseconds(plain, device, steps)) for _ in range(rounds)]
    found: dict[str, Any] = {"rounds": rounds, "steps per round": steps}
    for name, values in zip(("ours", "plain"), zip(*pairs)):
        found[name] = {
            **summary(values),
            "images/s": round(batch / median(values) * 1e3, 2),
            "first step s": round(first[name], 1),
            "ms of each round": [round(v, 2) for v in values],
        }
    found["ratio"] = summary([b / a for a, b in pairs], digits=3)
    return found


def summary(values: Any, digits: int = 2) -> dict[str, float]:
    low, middle, high = min(values), median(values), max(values)
    return {"median": round(middle, digits), "min": round(low, digits), "max": round(high, digits)}


def phases(step: Step, item: tuple[Batch, RandomNumbers], repeats: int = 3) -> dict[str, float]:
    """Median milliseconds of each phase and of the whole step."""
    rows = [step(k, [item]).read() for k in range(repeats)]
    names = [name for name in rows[0] if name.startswith(TIME)]
    return {name.removeprefix(TIME): round(median(row[name] for row in rows), 2) for name in names}


# -- what it ran on ----------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Versions of Python and PyTorch, and the hardware."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type != "cuda":
        return found | {"device": f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores, {cpu_name()}"}
    p = torch.cuda.get_device_properties(device)
    return found | {
        "device": p.name,
        "GiB": round(p.total_memory / 2**30, 2),
        "multiprocessors": p.multi_processor_count,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "peak bf16 TFLOP/s by data sheet": peak_tflops(p.name),
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def table(found: dict[str, Any]) -> str:
    """Format the results of :func:`alternate` for the terminal."""
    m, ours, plain = found["machine"], found["ours"], found["plain"]
    lines = [f"{m['device']}, torch {m['torch']}, {found['config']}, batch {found['batch']}", ""]
    lines.append(f"{'':<24}{'ours, ' + found['ours is']:>18}{'plain, ' + found['plain is']:>18}")
    for title, key in (("step (ms), median", "median"), ("  minimum", "min"), ("  maximum", "max"),
                       ("images/s", "images/s"), ("first step (s)", "first step s")):  # fmt: skip
        lines.append(f"{title:<24}{ours[key]:>18.1f}{plain[key]:>18.1f}")
    r = found["ratio"]
    lines.append(
        f"plain / ours: {r['median']:.2f} (min {r['min']:.2f}, max {r['max']:.2f}) over {found['rounds']} alternating "
        f"pairs of {found['steps per round']} steps each"
    )
    return "\n".join(lines)
