"""python -m trainer check: is this config sound, and what will it cost?"""

from __future__ import annotations

import argparse
import os

from trainer import config as configs

SUMMARY = "validate a config and print its parts, FLOPs and memory, without training or reading data"
GIB = 2**30
SAMPLE = 2  # images of the counted micro-batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file")
    parser.add_argument(
        "--world-size",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        help="data-parallel ranks that share the batch (default: 1)",
    )
    parser.epilog = "Any key of the config can be overridden: --section.key=value"


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = configs.load(arguments.config, overrides)
    if arguments.world_size < 1:
        raise configs.ConfigError(f"--world-size = {arguments.world_size}: expected at least 1")
    from trainer.assemble import check

    parts = check(config, arguments.world_size)
    print(report(config, parts, arguments.world_size))
    return 0


def report(config: configs.Config, parts, world_size: int) -> str:
    """The table that the command prints."""
    from components.estimate import parameter_bytes

    named = parts.modules.named()
    trained = {name for members in parts.recipe.trains.values() for name in members}
    lines = [f"recipe {config.recipe.name}: a sound config", "", f"{'part':<24}{'parameters':>14}  trained by"]
    for name, module in named.items():
        count = sum(p.numel() for p in module.parameters())
        group = next((g for g, members in parts.recipe.trains.items() if name in members), "-")
        lines.append(f"{name:<24}{count:>14,}  {group}")
    lines += [f"not used by this recipe: [{place}]" for place in parts.unused]
    cost = _cost(config, parts)
    per_rank = config.training.batch_size // world_size // config.training.accumulation
    learned = parameter_bytes([named[name] for name in trained if name in named])
    frozen = parameter_bytes([module for name, module in named.items() if name not in trained])
    averaged = parameter_bytes([named[n] for n in ("denoiser", "heads", "latent_norm") if n in named])
    if config.ema.tokenizer and "tokenizer" in trained:
        averaged += parameter_bytes([parts.modules.tokenizer])
    activations = cost.activation_bytes / SAMPLE * per_rank
    rows = [
        ("trained weights", learned),
        ("gradients", learned),
        ("AdamW states", 2 * learned),
        ("averaged weights (EMA)", averaged),
        ("frozen weights", frozen),
        (f"activations of {per_rank} images ({config.training.precision})", activations),
    ]
    latent = "x".join(str(n) for n in parts.latent)
    lines += [
        "",
        f"latent {latent}, batch {config.training.batch_size} = {world_size} ranks x {per_rank} images"
        f" x {config.training.accumulation} micro-batches",
        f"{cost.flops / SAMPLE / 1e9:,.1f} GFLOP per image and step, forward and backward, all parts",
        "",
        "estimated memory per GPU (GiB), every rank holding whole modules:",
        *(f"  {name:<40}{size / GIB:>9.2f}" for name, size in rows),
        f"  {'total':<40}{sum(size for _, size in rows) / GIB:>9.2f}",
    ]
    return "\n".join(lines)


def _cost(config: configs.Config, parts):
    """One micro-batch of the recipe on the meta device."""
    import torch

    from components.contracts import Batch
    from components.draws import Draws
    from components.estimate import step_cost

    named = parts.modules.named()
    trained = {name for members in parts.recipe.trains.values() for name in members}
    for name, module in named.items():
        module.requires_grad_(name in trained)
    r = config.training.resolution

    def update(group: str, terms: dict, **extra) -> None:
        total = sum(weight * value for weight, value in terms.values())
        if total.requires_grad:
            total.backward()

    def micro_batch() -> None:
        with torch.device("meta"):
            batch = Batch(torch.empty(SAMPLE, 3, r, r), torch.empty(SAMPLE, dtype=torch.int64))
            latents = (torch.empty(SAMPLE, *parts.latent) for _ in range(2))
            draws = Draws(*latents, torch.empty(SAMPLE), torch.empty(SAMPLE))
        # The last step: whatever starts late is counted.
        parts.recipe.step(parts.modules, batch, draws, update, config.training.steps)

    held = [t for module in named.values() for t in (*module.parameters(), *module.buffers())]
    return step_cost(micro_batch, held, autocast=config.training.precision == "bf16")
