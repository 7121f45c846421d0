"""python -m trainer benchmark: step time by phase and peak memory of a config, eager and compiled."""

from __future__ import annotations

import argparse
import time
from statistics import median

from trainer import config as configs

SUMMARY = "time a config's training step, eager and compiled, with its phases and peak memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per variant (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them (default: 3)")
    parser.add_argument("--only", choices=["eager", "compiled"], help="time one variant (default: both)")
    parser.add_argument("--data", action="store_true", help="read the config's dataset (default: random images)")
    parser.epilog = (
        "Weights are random, and no data is read unless --data is given. Times are medians over the timed steps.\n"
        "Any config key can be overridden: --section.key=value"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = configs.load(arguments.config, overrides)
    if arguments.steps < 1 or arguments.warmup < 0:
        raise configs.ConfigError("--steps: expected at least 1; --warmup: expected at least 0")
    from components.distributed import parallel
    from trainer.commands.train import set_backends
    from trainer.run.assemble import check

    world = parallel.join_world(config.parallel.timeout_s)
    try:
        set_backends(config)
        check(config, world.size, world.local_size)
        results = {}
        for variant in ["eager", "compiled"] if arguments.only is None else [arguments.only]:
            settings = config.training.model_copy(update={"compile": variant == "compiled"})
            variant_config = config.model_copy(update={"training": settings})
            results[variant] = measure(variant_config, world, arguments)
        if world.is_main:
            print(table(config, results, world))
        return 0
    finally:
        parallel.leave_world()


def measure(config: configs.Config, world, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and of each phase, images/s, and peak memory in GiB. Frees the model at the end."""
    import gc

    import torch

    device = world.device
    torch.manual_seed(config.training.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        steps = _times(config, world, arguments)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    finally:
        # Modules and their compiled code form reference cycles; collect them before the next variant is built.
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = median([s["step"] for s in steps])
    names = dict.fromkeys(name for s in steps for name in s if name != "step")
    result = {"step": seconds, "images_per_s": config.training.batch_size / seconds}
    result |= {f"phase {name}": median([s.get(name, 0.0) for s in steps]) for name in names}
    return result | {"peak GiB": peak}


def _times(config: configs.Config, world, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of each timed step and its phases; a step ends when the device has finished it."""
    import itertools

    from components.monitor.metrics import TIME
    from components.monitor.phases import PhaseClock
    from trainer.run.assemble import build
    from trainer.run.step import make_step

    parts = build(config, world, files=arguments.data)
    step = make_step(config, parts, world.device, clock=PhaseClock(world.device))
    found = []
    with _micro_batches(config, parts, world, arguments.data) as micro_batches:
        for k in range(arguments.warmup + arguments.steps):
            begin = time.perf_counter()
            # read() synchronizes with the device.
            values = step(k, itertools.islice(micro_batches, config.training.accumulation)).read()
            seconds = time.perf_counter() - begin
            phases = {n.removeprefix(TIME): v / 1e3 for n, v in values.items() if n.startswith(TIME)}
            if k >= arguments.warmup:
                found.append(phases | {"step": seconds})
    return found


def _micro_batches(config: configs.Config, parts, world, real: bool):
    """Context manager that yields an endless iterator of (batch, random numbers) on the device."""
    import contextlib
    import itertools

    import torch

    from components.contracts import Batch
    from components.data.loader import make_loader
    from components.data.prefetch import Prefetcher
    from components.diffusion.random_numbers import draw

    t = config.training
    size = t.batch_size // (world.size * t.accumulation)

    def random_numbers(position: int):
        found = draw(t.seed, 0, range(size), size, parts.random_numbers)
        return {name: numbers.to(world.device) for name, numbers in found.items()}

    if not real:
        images = torch.rand(size, 3, t.resolution, t.resolution, device=world.device) * 2 - 1
        labels = torch.arange(size, device=world.device) % parts.num_classes
        condition = parts.example_condition(size, world.device)._replace(label=labels)
        return contextlib.nullcontext(itertools.repeat((Batch(images, condition), random_numbers(0))))

    @contextlib.contextmanager
    def loading():
        options = {"rank": world.rank, "world": world.size, "accumulation": t.accumulation}
        loader = make_loader(
            parts.dataset, seed=t.seed, batch_size=t.batch_size, workers=config.loader.workers,
            prefetch=config.loader.prefetch, pin_memory=world.device.type == "cuda", **options,
        )  # fmt: skip
        with Prefetcher(loader, world.device, beside=random_numbers) as batches:
            yield ((batch, drawn) for batch, drawn, _ in batches)

    return loading()


def table(config: configs.Config, results: dict[str, dict[str, float]], world) -> str:
    """Results as text: one column per variant, times in milliseconds."""
    import torch

    name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"{world.size} x {name}, torch {torch.__version__}, batch {config.training.batch_size}", ""]
    lines.append(f"{'':<36}" + "".join(f"{variant:>12}" for variant in results))
    rows = dict.fromkeys(key for found in results.values() for key in found)
    for row in rows:
        scale, unit = {"images_per_s": (1, "images/s"), "peak GiB": (1, "GiB peak memory")}.get(row, (1e3, "ms"))
        title = unit if scale == 1 else f"{row.removeprefix('phase ')} ({unit})"
        cells = "".join(f"{found.get(row, 0.0) * scale:>12.1f}" for found in results.values())
        lines.append(
            f"{'  ' if row.startswith('phase') else ''}{title:<{34 if row.startswith('phase') else 36}}{cells}"
        )
    if len(results) == 2:
        lines.append(f"compiled is {results['eager']['step'] / results['compiled']['step']:.2f} x as fast as eager")
    if world.device.type == "cpu" and len(results) == 2:
        lines.append("(on a CPU, peak memory is that of the process: the second column includes the first)")
    return "\n".join(lines)
