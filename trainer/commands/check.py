"""python -m trainer check: validate a config and estimate its memory, communication and FLOPs."""

from __future__ import annotations

import argparse
import os

from components.monitor.hardware import GPU_GIB, GPU_TFLOPS
from trainer import config as configs
from trainer.startup import without_garbage_collection

SUMMARY = "validate a config and estimate memory, communication and FLOPs for any number of GPUs; needs no GPU or data"
GIB = 2**30
# Not part of the estimate: CUDA context and libraries, NCCL buffers, kernel workspaces; allocator fragmentation.
RESERVE_GIB, RESERVE_SHARE = 2.0, 0.05
# The low end is NeMo DFM's for Wan 2.1 14B on H100s with FSDP (176 to 229 of 989 TFLOP/s; 326 with Megatron), the high
# end that of train_configs/repae_sit_xl.toml on one H200 (docs/performance.md).
UTILIZATION = (0.18, 0.38)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file")
    parser.add_argument(
        "--world-size",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        help="number of ranks, one GPU each (default: 1)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per machine (default: 8)")
    parser.add_argument("--gpu", choices=sorted(GPU_GIB), help="report whether the run fits this GPU, and GPU-hours")
    parser.add_argument(
        "--utilization",
        type=_fractions,
        default=UTILIZATION,
        metavar="FRACTION",
        help="fraction of the GPU's peak bf16 FLOP/s assumed for the GPU-hours; LOW-HIGH for a range (default: "
        "0.18-0.38: published for a 14B video diffusion transformer with FSDP, and measured on one H200)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also run two real steps on this machine (or torchrun's ranks) and compare their peak memory",
    )
    parser.epilog = (
        "Builds the run as rank 0 would and traces one full step on fake tensors: about a minute for the largest\n"
        "networks. The exit status is 0 for a valid config, even if it does not fit --gpu.\n"
        "Any config key can be overridden: --section.key=value"
    )


@without_garbage_collection()  # nor does a run collect it automatically
def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = configs.load(arguments.config, overrides)
    size = arguments.world_size
    for name, value in (("--world-size", size), ("--gpus-per-node", arguments.gpus_per_node)):
        if value < 1:
            raise configs.ConfigError(f"{name} = {value}: expected at least 1")
    local_size, bf16, measured = min(arguments.gpus_per_node, size), config.training.precision == "bf16", None
    if arguments.measure:
        from components.distributed import parallel
        from trainer.estimate.measured_peak import measure_peak

        try:
            world = parallel.join_world(config.parallel.timeout_s)
            if size != world.size:
                raise configs.ConfigError(
                    f"--measure runs on {world.size} ranks, but --world-size = {size}; omit --world-size, or start "
                    f"torchrun --nproc-per-node={size} -m trainer check ..."
                )
            measured, bf16 = measure_peak(config, world)
            local_size = world.local_size
        finally:
            parallel.leave_world()
        if not world.is_main:
            return 0
    from trainer.estimate.dry_run import dry_run

    cost = dry_run(config, size, local_size, bf16)
    print(report(config, cost, size, local_size, bf16))
    print("\n" + check_dataset(config))
    if arguments.gpu:
        print("\n" + verdict(config, cost, arguments.gpu))
        print(gpu_hours(config, cost, size, arguments.gpu, arguments.utilization))
    if measured is not None:
        error = cost.total / measured - 1
        print(f"\nmeasured peak on this machine: {measured / GIB:.3f} GiB; estimation error {error:+.1%}")
    return 0


def check_dataset(config: configs.Config) -> str:
    """Read one item of the dataset, if its files are there; returns what was found.

    Raises:
        DataError: the item is not as the contract says.
    """
    from components.data.loader import DataError
    from trainer.run.construct import check_first_item, make_plugin

    try:
        dataset = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    except (DataError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        return f"dataset not checked: {reason}"
    check_first_item(dataset, config)
    return f"dataset: {len(dataset):,} items, {dataset.num_classes:,} classes; read one, as its contract says"


def report(config: configs.Config, cost, size: int, local_size: int, bf16: bool) -> str:
    """Report of parts, mesh, FLOPs, memory and communication as text."""
    from trainer.estimate.dry_run import KINDS

    recipe, t = cost.parts.recipe, config.training
    lines = [f"recipe {config.recipe.name}: valid config", "", f"{'part':<24}{'parameters':>14}  trained by"]
    for name, module in cost.parts.modules.named().items():
        count = sum(p.numel() for p in module.parameters())
        group = next((g for g, members in recipe.trains.items() if name in members), "-")
        lines.append(f"{name:<24}{count:>14,}  {group}")
    lines += [f"not used by this recipe: [{place}]" for place in cost.parts.unused]
    replicate, shard = cost.mesh
    arithmetic = "bf16" if bf16 else t.precision.replace("bf16", "fp32")
    per_image = cost.flops / (cost.images * t.accumulation)
    offloaded = ", excluding host memory" if config.parallel.cpu_offload else ""
    lines += [
        "",
        f"latent {'x'.join(str(n) for n in cost.parts.latent)}, batch {t.batch_size} = {size} ranks x {cost.images} "
        f"images x {t.accumulation} micro-batches",
        f"parallel.strategy = {config.parallel.strategy}: {replicate} replicas x {shard} shards, "
        f"{local_size} GPUs per node",
        f"{cost.flops / 1e12:,.2f} TFLOP per GPU and step ({per_image / 1e9:,.1f} GFLOP per image): forward, "
        "backward and recomputation",
        "",
        f"estimated memory per GPU (GiB), in {arithmetic}, not compiled{offloaded}:",
        f"  {'':<34}{'at the peak':>14}{'maximum':>14}",
        *(f"  {k:<34}{cost.peak.get(k, 0) / GIB:>14.3f}{cost.most.get(k, 0) / GIB:>14.3f}" for k in KINDS),
        f"  {'total':<34}{cost.total / GIB:>14.3f}",
        "",
        f"{'each GPU sends per step (GiB):':<32}{'within its node':>18}{'to other nodes':>18}",
    ]
    sent = [name for name in sorted(cost.traffic.within) if cost.traffic.within[name] + cost.traffic.across[name]]
    for name in sent:
        within, across = cost.traffic.within[name] / GIB, cost.traffic.across[name] / GIB
        lines.append(f"  {name:<30}{within:>18.3f}{across:>18.3f}")
    return "\n".join(lines if sent else lines[:-2])


def gpu_hours(config: configs.Config, cost, size: int, gpu: str, utilization: tuple[float, ...]) -> str:
    """GPU-hours of the whole run at assumed fractions of the GPU's peak, low and high; not a measurement."""
    steps, peak = config.training.steps, GPU_TFLOPS[gpu] * 1e12
    hours = [steps * cost.flops / (peak * fraction) / 3600 for fraction in reversed(utilization)]
    of_all, each = (" to ".join(f"{h * count:,.0f}" for h in hours) for count in (size, 1))
    assumed = " to ".join(f"{fraction:.0%}" for fraction in utilization)
    return (
        f"training.steps = {steps:,}: {of_all} GPU-hours, {each} hours on {size}, assuming {assumed} of "
        f"{GPU_TFLOPS[gpu]:,} TFLOP/s (--utilization)"
    )


def _fractions(text: str) -> tuple[float, ...]:
    """Parse ``FRACTION`` or ``LOW-HIGH``."""
    try:
        found = tuple(sorted({float(part) for part in text.split("-", 1)}))
    except ValueError:
        found = ()
    if not found or not 0 < found[0] <= found[-1] <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number in (0, 1], or a range such as 0.2-0.4")
    return found


def verdict(config: configs.Config, cost, gpu: str) -> str:
    """Whether the run fits a GPU, and which settings would help if not."""
    capacity = GPU_GIB[gpu]
    needed = cost.total / GIB * (1 + RESERVE_SHARE) + RESERVE_GIB
    reserve = f"with a reserve of {RESERVE_GIB:g} GiB + {RESERVE_SHARE:.0%}"
    if needed <= capacity:
        return f"fits {gpu} ({capacity} GiB): {1 - needed / capacity:.0%} free, {reserve}"
    helps = "\n".join(f"  {line}" for line in advice(config, cost))
    return f"does not fit {gpu} ({capacity} GiB): needs {needed:.1f} GiB, {reserve}. Options:\n{helps}"


def advice(config: configs.Config, cost) -> list[str]:
    """Config keys that reduce memory, starting with those for the largest consumer."""
    from trainer.estimate.dry_run import FROZEN, OFFLOADED, TEMPORARY

    replicate, shard = cost.mesh
    trained = {name for members in cost.parts.recipe.trains.values() for name in members}
    active, states = [], []
    for role in ("denoiser", "tokenizer"):
        if role in trained and config.activation_checkpoint.model_dump()[role] != "full":
            active.append(f'activation_checkpoint.{role} = "full"')
    if cost.images > 1:
        factor = next(n for n in range(2, cost.images + 1) if cost.images % n == 0)
        active.append(
            f"training.accumulation = {config.training.accumulation * factor} (the same batch in smaller micro-batches)"
        )
    if replicate > 1:
        states.append(
            f'parallel.strategy = "fsdp" (shards weights, gradients and optimizer states over {replicate * shard} '
            f"GPUs instead of {shard})"
        )
    if cost.peak.get(FROZEN, 0) and replicate * shard > 1 and not config.parallel.shard_frozen:
        states.append("parallel.shard_frozen = true")
    if not config.parallel.cpu_offload:
        states.append("parallel.cpu_offload = true (much slower)")
    held = sum(cost.peak.get(kind, 0) for kind in (*OFFLOADED, FROZEN))
    found = active + states if cost.peak.get(TEMPORARY, 0) > held else states + active
    return [*found, "more GPUs, or a smaller training.batch_size or training.resolution"]
