"""Parts of the benchmark of one GPU (benchmarks/gpu.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import floor
from benchmarks.workload import (
    PlainWorkload,
    Workload,
    alternate,
    free,
    median_ms,
    milliseconds,
    phases,
    summary,
    wait,
)
from components.diffusion.image_sampler import ImageSampler, SamplingPlan
from components.diffusion.samplers import Guidance
from components.monitor.hardware import peak_tflops
from components.nn.group_norm import GroupNorm
from plugins.losses.lpips import LPIPS
from plugins.losses.patchgan import PatchDiscriminator
from trainer import config as configs
from trainer.run.construct import construct_parts
from trainer.run.monitor.flops import flops_per_image

SECOND_STAGE = "repa"


def digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


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
        self.compiled = True
        self._work: Workload | None = None

    # -- models --------------------------------------------------------------------------------------------------------

    @property
    def work(self) -> Workload:
        assert self._work is not None, "parts are called by `using`, which builds it"
        return self._work

    def using(self, compiled: bool, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a part with a compiled or an eager model; eager convolutions have a layout of their own."""
        if self._work is None or self.compiled != compiled:
            self._work, self.compiled = None, compiled
            free(self.device)
            self._work = Workload(self.config, self.device, compile=compiled, backend=self.backend)
        return function(*arguments)

    def sizes(self) -> dict[str, Any]:
        named = self.work.parts.modules.named()
        counts = {name: round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for name, m in named.items()}
        return {"million parameters": counts, "GiB": self.peak_memory()}

    def plain(self, recipe: str | None = None, compiled: bool | None = None) -> PlainWorkload:
        """Build the plain step for one part only, so that its memory does not count in other parts."""
        compiled = self.compiled if compiled is None else compiled
        chosen = {} if recipe is None else {"recipe": configs.PluginTable(name=recipe)}
        config = self.config.model_copy(update=chosen)
        return PlainWorkload(config, self.device, compile=compiled, backend=self.backend)

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
        second = self.config.model_copy(update={"recipe": configs.PluginTable(name=SECOND_STAGE)})
        stages = {None: (self.config, None), SECOND_STAGE: (second, list(second.encoders))}
        return {
            recipe: flops_per_image(config, construct_parts(config, on_meta=True), cached) / 1e12
            for recipe, (config, cached) in stages.items()
        }

    def tflop(self) -> dict[str, float]:
        """Model TFLOP per image and step, without recomputation, as ``train`` reports them."""
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

    def beside_plain(self, size: int, recipe: str | None = None, compiled: bool | None = None) -> dict[str, Any]:
        """Time the project's step and the plain step, alternating; ``compiled``: the plain one (None: as ours)."""
        ours, plain = self.work.runner(size, recipe), self.plain(recipe, compiled).runner(size)
        found = alternate(ours, plain, self.device, self.rounds, self.steps, size)
        for name, run in (("ours", ours), ("plain", plain)):
            found[name]["GiB per image"] = self.growth(run, size)
        return found

    def growth(self, run: Callable[[], Any], size: int) -> float | None:
        """Peak GiB of a step per image, beyond what is held between steps."""
        free(self.device)
        self.peak_memory()
        held = torch.cuda.memory_allocated() / 2**30 if self.on_gpu else 0.0
        run()
        wait(self.device)
        peak = self.peak_memory()
        return digits((peak["allocated"] - held) / size) if peak else None

    def floor(self, size: int) -> dict[str, Any]:
        """Time of an eager step's convolutions, products and attention alone; see benchmarks/floor.py."""
        step, item = self.work.step(), self.work.batch(size)
        with floor.Operations() as operations:
            step(0, [item])
        return floor.measure(operations.seen, self.device, lambda run, count: milliseconds(run, self.device, count))

    def switched(self, size: int, switch: str) -> dict[str, Any]:
        """Time the compiled step ("ours") beside the same step with one switch set otherwise ("plain")."""
        run = self.work.runner(size)

        def other() -> Any:
            with SWITCHES[switch](self.work):
                return run()

        return alternate(run, other, self.device, self.rounds, self.steps, size)

    def compile_variants(self, size: int) -> None:
        """Run one step as it is, and one with LPIPS and the discriminator in bf16."""
        for switch in (contextlib.nullcontext, losses_in_bf16):
            with switch(self.work):
                self.work.runner(size)()

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

    def kernels(self, size: int, name: str, recipe: str | None = None, rows: int = 12) -> dict[str, Any]:
        """Most expensive kernels (on a CPU: operators); a longer table is written to kernels_NAME.txt."""
        steps = 2
        step, item = self.work.step(recipe), self.work.batch(size, recipe)
        for k in range(2):
            step(k, [item])
        wait(self.device)
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu]) as found:
            for k in range(steps):
                step(k, [item])
            wait(self.device)
        averages = found.key_averages()
        kind = "device" if self.on_gpu else "cpu"
        text = averages.table(sort_by=f"self_{'cuda' if self.on_gpu else 'cpu'}_time_total", row_limit=250,
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


@contextlib.contextmanager
def losses_in_bf16(work: Workload) -> Iterator[None]:
    modules = [m for network in work.parts.modules.named().values() for m in network.modules()]
    networks = [m for m in modules if isinstance(m, (LPIPS, PatchDiscriminator))]
    before = [network.precision for network in networks]
    for network in networks:
        network.precision = "run"
    try:
        yield
    finally:
        for network, precision in zip(networks, before):
            network.precision = precision


@contextlib.contextmanager
def plain_group_norm(work: Workload) -> Iterator[None]:
    GroupNorm.fast = False
    try:
        yield
    finally:
        GroupNorm.fast = True


SWITCHES = {
    "LPIPS and discriminator in bf16": losses_in_bf16,
    "PyTorch's group norm": plain_group_norm,
}
