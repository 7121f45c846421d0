"""Sampling of latents by this project, in fp32 and bf16, beside a plain sampler in fp32, alternating in one process.

    python benchmarks/sampling.py CONFIG --batch=16 --steps=25 --rounds=5 [--section.key=value ...]

The plain sampler does what the published code does (SiT, REPA): Euler steps in float64, a batch of conditional and
unconditional images, and a model whose forward pass includes the alignment heads, which only training needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from components.contracts import Condition, Modules


@torch.no_grad()
def plain_euler(m: Modules, noise: Tensor, condition: Condition, steps: int, scale: float) -> Tensor:
    """Latents (B, C, h, w), float64, from noise of the same shape; classifier-free guidance at every step."""
    null = m.denoiser.null_condition(condition)
    both = condition.combine(lambda *values: torch.cat(values), null)
    x, times = noise.double(), torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(times[:-1], times[1:]):
        doubled = torch.cat([x, x]).to(noise.dtype)
        out = m.denoiser(doubled, torch.full((len(doubled),), t, dtype=noise.dtype, device=x.device), both)
        for head in m.heads:
            head(out.tokens)
        good, bad = out.velocity.double().chunk(2)
        x = x + (t_next - t) * (bad + scale * (good - bad))
    return x


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Time sampling with guidance beside a plain sampler, alternating; without decoding.",
        epilog="Weights are random. Any config key can be overridden: --section.key=value",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file of a recipe with a denoiser and alignment heads")
    parser.add_argument("--batch", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps (default: 25)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale, above 1 (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    a, overrides = parser.parse_known_args(argv)
    from benchmarks.workload import Workload, machine, milliseconds, pick_device
    from components.diffusion.samplers import Guidance, sample_ode
    from trainer import config as configs
    from trainer.__main__ import user_errors
    from trainer.commands.train import set_backends

    try:
        if min(a.batch, a.steps, a.rounds) < 1 or a.guidance <= 1:
            raise configs.ConfigError("--batch, --steps and --rounds: expected at least 1; --guidance: above 1")
        config, device = configs.load(a.config, overrides), pick_device()
        set_backends(config)
        parts = Workload(config, device, compile=False).parts
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    m = parts.modules
    condition = parts.sampling_condition(torch.arange(a.batch, device=device))
    noise = torch.randn(a.batch, *parts.latent, device=device)

    def ours(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return sample_ode(m.denoiser, noise, condition, steps=a.steps, guidance=Guidance(a.guidance))

    samplers: dict[str, Callable[[], Tensor]] = {
        "plain, fp32": lambda: plain_euler(m, noise, condition, a.steps, a.guidance),
        "ours, fp32": lambda: ours(None),
        "ours, bf16": lambda: ours(torch.bfloat16),
    }
    m.denoiser.eval()
    for p in m.denoiser.parameters():  # the last layer begins at zero, and with it every velocity
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    latents = {name: run() for name, run in samplers.items()}  # also the warm-up
    rounds = [{name: milliseconds(run, device, 1) for name, run in samplers.items()} for _ in range(a.rounds)]
    reference = latents["plain, fp32"]
    found = {"machine": machine(device), "config": a.config, "overrides": overrides, "batch": a.batch, "steps": a.steps}
    print(f"{found['machine']['device']}, torch {torch.__version__}, {a.config}, batch {a.batch}, {a.steps} steps")
    for name in samplers:
        times, ratios = [r[name] for r in rounds], [r["plain, fp32"] / r[name] for r in rounds]
        off = ((latents[name] - reference).norm() / reference.norm()).item()
        found[name] = {
            "images/s": round(a.batch / median(times) * 1e3, 3),
            "ratio": round(median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "relative difference": float(f"{off:.2g}"),
        }
        print(
            f"{name:<12} {found[name]['images/s']:8.2f} images/s, plain / this {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), latents differ by {off:.1e}"
        )
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
