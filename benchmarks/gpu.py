"""Benchmark of one GPU: step times by phase, memory, MFU, comparison with the plain step, sampling, kernels.

    python benchmarks/gpu.py --out FOLDER [--seconds N] [--section.key=value ...]

Weights and data are random; only the config is read. The model is built once, and every part is timed on it.
FOLDER/gpu.json is complete after every part. `benchmarks/gpu.sh` also runs the tests that need a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BEGAN = time.monotonic()  # before PyTorch's import, which takes seconds of the time limit

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import LeftOut, Results
from benchmarks.workload import (
    PlainWorkload,
    Workload,
    alternate,
    eager,
    free,
    machine,
    median_ms,
    milliseconds,
    phases,
    pick_device,
    summary,
    wait,
)
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.samplers import Guidance
from components.monitor.hardware import peak_tflops
from trainer import config as configs
from trainer.__main__ import user_errors
from trainer.commands.train import set_backends

CONFIG = Path(__file__).resolve().parents[1] / "train_configs/repae_sit_xl.toml"
SECOND_STAGE = "repa"
TINY = [
    "--training.resolution=32",
    "--denoiser.width=32",
    "--denoiser.depth=2",
    "--denoiser.heads=2",
    "--denoiser.align_depth=1",
    "--tokenizer.channels=8",
    "--tokenizer.norm_groups=4",
    "--tokenizer.res_blocks=1",
    "--losses.cosine.head_width=32",
    "--losses.patchgan.channels=8",
    "--losses.patchgan.layers=2",
    "--encoders={tiny_vit = {}}",
]


class Bench:
    """Parts of the benchmark; each method returns its entry in the JSON file.

    Args:
        config: of a joint run (REPA-E).
        rounds, steps: number of measurements of a step time, and steps per measurement.
        out: folder for tables of kernels.
        backend: for torch.compile.
    """

    def __init__(
        self, config: configs.Config, device: torch.device, rounds: int, steps: int, out: Path, backend: str
    ) -> None:
        self.config, self.device, self.rounds, self.steps = config, device, rounds, steps
        self.out, self.backend = out, backend
        self.on_gpu = device.type == "cuda"
        self._work: Workload | None = None

    # -- models --------------------------------------------------------------------------------------------------------

    @property
    def work(self) -> Workload:
        if self._work is None:
            raise LeftOut("the part 'build' did not succeed")
        return self._work

    def build(self) -> dict[str, Any]:
        self._work = Workload(self.config, self.device, compile=True, backend=self.backend)
        named = self.work.parts.modules.named()
        counts = {name: round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for name, m in named.items()}
        return {"million parameters": counts, "GiB": self.peak_memory()}

    def plain(self, recipe: str | None = None) -> PlainWorkload:
        """Build the plain step for one part only, so that its memory does not count in other parts."""
        chosen = {} if recipe is None else {"recipe": configs.PluginTable(name=recipe)}
        config = self.config.model_copy(update=chosen)
        return PlainWorkload(config, self.device, compile=True, backend=self.backend)

    def clear(self) -> None:
        """Free memory that a part left, also after an out-of-memory error."""
        if self._work is not None:
            self._work.clear()
        free(self.device)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def ceilings(self, side: int) -> dict[str, float]:
        """Attained TFLOP/s of matrix products and TB/s of copies, as upper bounds for a step."""
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        c, d = a.float(), b.float()
        x = torch.randn(8 * side**2, device=self.device)
        y = torch.empty_like(x)
        bf16, fp32, copy = (median_ms(run, self.device) for run in (lambda: a @ b, lambda: c @ d, lambda: y.copy_(x)))
        name = "fp32 TFLOP/s, with TF32" if torch.backends.cuda.matmul.allow_tf32 else "fp32 TFLOP/s"
        return {
            "bf16 TFLOP/s": round(2 * side**3 / bf16 / 1e9, 1),
            name: round(2 * side**3 / fp32 / 1e9, 1),
            "copy TB/s, read and write": round(2 * x.nbytes / copy / 1e9, 2),
        }

    @functools.cached_property
    def _tflop(self) -> dict[str | None, float]:
        found: dict[str | None, float] = {}
        for recipe in (None, SECOND_STAGE):
            step, item = self.work.step(recipe), self.work.batch(2, recipe)
            with eager(), FlopCounterMode(display=False) as counter:
                step(0, [item])
            found[recipe] = counter.get_total_flops() / 2 / 1e12
        return found

    def tflop(self) -> dict[str, float]:
        """Model TFLOP per image and step, without recomputation."""
        return {"joint step": digits(self._tflop[None]), "second stage": digits(self._tflop[SECOND_STAGE])}

    def joint(self, size: int, recipe: str | None = None, by_phase: bool = True) -> dict[str, Any]:
        """Step time, images/s, MFU, memory, and step time by phase."""
        free(self.device)
        held = round(torch.cuda.memory_allocated() / 2**30, 2) if self.on_gpu else None
        self.peak_memory()
        run = self.work.runner(size, recipe)
        first = milliseconds(run, self.device, 1) / 1e3
        for _ in range(2):
            run()
        first_peak = self.peak_memory()  # includes the workspaces of cuDNN's benchmarking
        times = [milliseconds(run, self.device, self.steps) for _ in range(self.rounds)]
        memory = {"GiB": self.peak_memory(), "GiB in the first steps": first_peak, "GiB before": held}
        values = run()
        images = size / median(times) * 1e3
        found: dict[str, Any] = {"ms": summary(times), "images/s": round(images, 1), "first step s": round(first, 1)}
        tflops = images * self._tflop[recipe]
        found["TFLOP/s"] = digits(tflops)
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if self.on_gpu else None
        found["MFU"] = digits(tflops / peak) if peak else None
        found |= memory
        found["finite"] = values.get("skipped_steps") == 0
        found["losses"] = {k: round(v, 4) for k, v in values.items() if k.endswith("/loss")}
        if by_phase:
            found["phases ms"] = phases(self.work.step(recipe), self.work.batch(size, recipe))
        return found

    def second_stage(self, size: int) -> dict[str, Any]:
        """Like :meth:`joint`, for a denoiser's step on cached latents and features."""
        return self.joint(size, SECOND_STAGE, by_phase=False)

    def beside_plain(self, size: int, recipe: str | None = None) -> dict[str, Any]:
        """Time the project's step and the plain step, alternating."""
        ours, plain = self.work.runner(size, recipe), self.plain(recipe).runner(size)
        return alternate(ours, plain, self.device, self.rounds, self.steps, size)

    def sampling(self, size: int, steps: int) -> dict[str, Any]:
        """Time of sampling and decoding: Euler, guidance 4 at every step, averaged weights; bf16 on a GPU."""
        parts, average = self.work.parts, self.work.ema.modules
        m = dataclasses.replace(parts.modules, denoiser=average["denoiser"], latent_norm=average["latent_norm"])
        condition = parts.sampling_condition(torch.arange(size, device=self.device))

        def sampler(count: int) -> ImageSampler:
            return ImageSampler(SamplingPlan("euler", count, Guidance(4.0)), parts.recipe, m, parts.latent)

        with self.work.step().evaluating():
            sampler(2)(range(size), condition)
            whole = sampler(steps)
            times = [milliseconds(lambda: whole(range(size), condition), self.device, 1) for _ in range(2)]
        return {
            "batch": size,
            "steps": steps,
            "s": round(min(times) / 1e3, 3),
            "images/s": round(size / min(times) * 1e3, 2),
        }

    def waits(self, size: int) -> list[str]:
        """Lines of Python code at which a step synchronizes with the GPU, from PyTorch's warnings."""
        step, item = self.work.step(), self.work.batch(size)
        for k in range(2):
            step(k, [item])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step(2, [item])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sorted({f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)})

    def kernels(self, size: int, name: str, rows: int = 25, steps: int = 2) -> dict[str, Any]:
        """Most expensive kernels (on a CPU: operators); a longer table is written to kernels_NAME.txt."""
        step, item = self.work.step(), self.work.batch(size)
        for k in range(2):
            step(k, [item])
        wait(self.device)
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu]) as found:
            for k in range(steps):
                step(k, [item])
            wait(self.device)
        averages = found.key_averages()
        kind = "device" if self.on_gpu else "cpu"
        text = averages.table(sort_by=f"self_{'cuda' if self.on_gpu else 'cpu'}_time_total", row_limit=80,
                              max_name_column_width=100)  # fmt: skip
        (self.out / f"kernels_{name}.txt").write_text(text)
        events = [e for e in averages if not self.on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
        cost = {e.key: getattr(e, f"self_{kind}_time_total") / steps / 1e3 for e in events}
        events.sort(key=lambda e: cost[e.key], reverse=True)
        top = [
            {"ms": round(cost[e.key], 3), "calls": round(e.count / steps, 1), "kernel": e.key[:140]}
            for e in events[:rows]
        ]
        return {"ms of all per step": round(sum(cost.values()), 2), "top, per step": top}

    def peak_memory(self) -> dict[str, float] | None:
        """Peak GiB of PyTorch's allocator since the last call; None on a CPU."""
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return dict(zip(("allocated", "reserved"), (round(n / 2**30, 2) for n in peak)))


def measure(bench: Bench, results: Results, batches: list[int], tiny: bool) -> None:
    """Run all parts, ordered by information per second."""
    small, middle, large = batches
    part, call = results.part, functools.partial
    scale = 0 if tiny else 1  # factor on the seconds that a part needs
    part("machine", 0, lambda: machine(bench.device), required=True)
    part("ceilings", 5 * scale, call(bench.ceilings, 128 if tiny else 8192))
    part("build", 5 * scale, bench.build, required=True)
    part("TFLOP per image", 5 * scale, bench.tflop)
    # On a host that compiles slowly, leave time for the eager parts.
    part(f"joint step, compiled, batch {middle}", 40 * scale, call(bench.joint, middle), share=0.6)
    part(f"kernels, compiled, batch {middle}", 10 * scale, call(bench.kernels, middle, "compiled"))
    if bench.on_gpu:
        part(f"waits, compiled, batch {middle}", 5 * scale, call(bench.waits, middle))
    part(f"joint step beside the plain step, eager, batch {small}", 20 * scale, in_eager(bench.beside_plain, small))
    for size in batches:
        part(f"joint step, eager, batch {size}", 10 * scale, in_eager(bench.joint, size))
    stages = [middle, 3 * middle, 8 * middle]
    for size in stages:
        part(f"second stage, compiled, batch {size}", 15 * scale, call(bench.second_stage, size))
    part(f"sampling, eager, batch {2 * middle}", 15 * scale, in_eager(bench.sampling, 2 * middle, 2 if tiny else 50))
    part(f"joint step beside the plain step, compiled, batch {middle}", 75 * scale, call(bench.beside_plain, middle))
    name = f"second stage beside the plain step, eager, batch {3 * middle}"
    part(name, 15 * scale, in_eager(bench.beside_plain, 3 * middle, SECOND_STAGE))
    for size in stages:
        part(f"second stage, eager, batch {size}", 5 * scale, in_eager(bench.second_stage, size))
    part(f"kernels, eager, batch {small}", 10 * scale, in_eager(bench.kernels, small, "eager"))
    part(f"joint step, compiled, batch {large}", 40 * scale, call(bench.joint, large))


def digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def in_eager(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def run() -> Any:
        with eager():
            return function(*arguments)

    return run


def warm_up(bench: Bench, size: int) -> None:
    """Compile both steps, so that the parts find them in Inductor's cache on disk."""
    bench.build()
    bench.work.runner(size)()
    bench.clear()
    print("compiled the project's step", flush=True)
    bench.plain().runner(size)()
    print("compiled the plain step", flush=True)


def main(argv: list[str] | None = None, began: float | None = None) -> int:
    """Run the command line; its time limit counts from ``began``, a time of the monotonic clock."""
    began = time.monotonic() if began is None else began
    parser = argparse.ArgumentParser(
        description="Time this project's training steps and sampling on one GPU, and compare with the plain step.",
        epilog="Any config key can be overridden: --section.key=value",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and tables of kernels")
    parser.add_argument("--seconds", type=float, default=460, help="time limit in seconds (default: 460)")
    parser.add_argument("--config", default=str(CONFIG), help="TOML config of a joint run")
    parser.add_argument(
        "--batches", type=int, nargs=3, metavar=("SMALL", "MIDDLE", "LARGE"), help="batch sizes (default: 16 32 48)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="run only parts whose name contains a TEXT"
    )
    parser.add_argument("--tiny", action="store_true", help="smoke test: small networks, few steps")
    parser.add_argument("--warm", action="store_true", help="only compile, to fill the cache on disk; no timing")
    a, overrides = parser.parse_known_args(argv)
    device = pick_device()
    try:
        if min(a.batches or [1]) < 1:
            raise configs.ConfigError(f"--batches {a.batches}: expected at least 1")
        config = configs.load(a.config, ([*TINY] if a.tiny else []) + overrides)
        set_backends(config)
        # On a CPU, Inductor would spend minutes compiling C++.
        backend = "eager" if a.tiny and device.type == "cpu" else "inductor"
        rounds, steps = (1, 1) if a.tiny else (5, 4)
        a.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(config, device, rounds, steps, a.out, backend)
        batches = a.batches or ([2, 3, 4] if a.tiny else [16, 32, 48])
        if a.warm:
            warm_up(bench, batches[1])
            return 0
        results = Results(a.out / "gpu.json", began + a.seconds - time.monotonic(), a.only, bench.clear)
        results.about = {"config": a.config, "overrides": overrides, "tiny": a.tiny}
        measure(bench, results, batches, a.tiny)
        return 0
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted" + ("" if a.warm else f"; results so far are in {a.out / 'gpu.json'}"), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
