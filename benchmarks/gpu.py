"""Benchmark of one GPU: step times by phase, memory, MFU, comparison with the plain step, sampling, kernels.

    python benchmarks/gpu.py --out FOLDER [--seconds N] [--section.key=value ...]

Weights and data are random; only the config is read. The model is built once, and every part is timed on it.
FOLDER/gpu.json is complete after every part. `benchmarks/gpu.sh` also runs the tests that need a GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BEGAN = time.monotonic()  # before PyTorch's import, which takes seconds of the time limit

from benchmarks.gpu_parts import SECOND_STAGE, SWITCHES, Bench
from benchmarks.results import Results
from benchmarks.workload import machine, pick_device
from trainer import config as configs
from trainer.__main__ import user_errors
from trainer.commands.train import set_backends

CONFIG = Path(__file__).resolve().parents[1] / "train_configs/repae_sit_xl.toml"
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


def measure(bench: Bench, results: Results, batches: list[int], tiny: bool) -> None:
    """Run all parts, ordered by information per second."""
    small, middle, large = batches
    part, call = results.part, functools.partial
    scale = 0 if tiny else 1  # factor on the seconds that a part needs
    part("machine", 0, lambda: machine(bench.device), required=True)
    part("ceilings", 5 * scale, call(bench.ceilings, 128 if tiny else 8192))
    part("TFLOP per image", 5 * scale, bench.tflop)
    compiled, eager = call(call, bench.using, True), call(call, bench.using, False)
    part("build", 5 * scale, compiled(bench.sizes))
    # On a host that compiles slowly, leave time for the eager parts.
    part(f"joint step, compiled, batch {middle}", 40 * scale, compiled(bench.joint, middle), share=0.6)
    part(f"kernels, compiled, batch {middle}", 10 * scale, compiled(bench.kernels, middle, "compiled"))
    name = f"joint step beside the plain step, compiled, batch {middle}"
    part(name, 60 * scale, compiled(bench.beside_plain, middle))
    name = f"joint step, compiled, beside the plain step, eager, batch {middle}"
    part(name, 45 * scale, compiled(bench.beside_plain, middle, None, False))
    stages = [3 * middle, 8 * middle]
    for size in stages:
        part(f"second stage, compiled, batch {size}", 15 * scale, compiled(bench.second_stage, size))
    name = f"kernels, second stage, compiled, batch {stages[0]}"
    part(name, 10 * scale, compiled(bench.kernels, stages[0], "second_stage", SECOND_STAGE))
    for switch in SWITCHES:
        part(f"{switch}, compiled, batch {middle}", 30 * scale, compiled(bench.switched, middle, switch))
    if bench.on_gpu:
        part(f"waits, compiled, batch {middle}", 5 * scale, compiled(bench.waits, middle))
    part(f"joint step, compiled, batch {large}", 40 * scale, compiled(bench.joint, large), share=0.5)

    name = f"joint step beside the plain step, eager, batch {small}"
    part(name, 45 * scale, eager(bench.beside_plain, small))
    for size in batches:
        part(f"joint step, eager, batch {size}", 20 * scale, eager(bench.joint, size))
    part(f"floor, batch {middle}", 15 * scale, eager(bench.floor, middle))
    part(f"sampling, eager, batch {2 * middle}", 15 * scale, eager(bench.sampling, 2 * middle, 2 if tiny else 50))
    name = f"second stage beside the plain step, eager, batch {stages[0]}"
    part(name, 15 * scale, eager(bench.beside_plain, stages[0], SECOND_STAGE))
    for size in stages:
        part(f"second stage, eager, batch {size}", 5 * scale, eager(bench.second_stage, size))
    part(f"kernels, eager, batch {small}", 10 * scale, eager(bench.kernels, small, "eager"))


def warm_up(bench: Bench, size: int) -> None:
    """Compile both steps, so that the parts find them in Inductor's cache on disk."""
    bench.using(True, bench.compile_variants, size)
    print(f"compiled the project's step in {time.monotonic() - BEGAN:.0f} s", flush=True)
    bench.clear()
    bench.plain().runner(size)()
    print(f"compiled the plain step in {time.monotonic() - BEGAN:.0f} s", flush=True)


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
