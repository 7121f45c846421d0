"""python -m trainer sample: sample images from a trained model."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config as configs

if TYPE_CHECKING:
    import torch

    from components.diffusion.image_sampler import ImageSampler, SamplingPlan
    from components.distributed.parallel import World
    from trainer.models.sample_folder import SampleFolder
    from trainer.models.source import LoadedModel
    from trainer.run.parts import Parts

SUMMARY = "sample images from a run, a checkpoint or an exported model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder (outputs/NAME), one of its checkpoints, or a model folder")
    parser.add_argument("--num-samples", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--out", help="output folder (default: samples/... in the source)")
    add_model_arguments(parser)
    parser.add_argument("--method", help="sampler: euler, heun, sde or one of the recipe's (default: as in the run)")
    parser.add_argument("--steps", type=int, help="integration steps (default: as in the run)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1: none (default: as in the run)")
    parser.add_argument(
        "--guidance-kind",
        choices=("classifier_free", "internal"),
        help="what to guide away from: the unconditional velocity, or the denoiser's early prediction (default: as in "
        "the run)",
    )
    parser.add_argument("--guidance-low", type=float, help="smallest t with guidance (t = 0 is data)")
    parser.add_argument("--guidance-high", type=float, help="largest t with guidance (t = 1 is noise)")
    parser.add_argument("--shift", type=float, help="timestep shift; 1: none (default: as in the run)")
    parser.add_argument("--guide", metavar="SOURCE", help="autoguidance: weaker model to guide away from")
    parser.add_argument(
        "--labels",
        default="balanced",
        help="balanced (cycle through all classes that have images), random, dataset (as often as in the training "
        "data), or classes by index or name, e.g. 0,3,cat; index:2 and name:2 where names are numbers",
    )
    parser.add_argument("--seed", type=int, default=0, help="noise seed; image i depends only on it and i (default: 0)")
    parser.add_argument("--batch-size", type=int, help="images per batch and rank (default: 64)")
    parser.add_argument("--no-npz", action="store_true", help="do not write samples.npz (ADM evaluation format)")
    parser.epilog = (
        "Writes PNG files, grid.png, samples.npz (arr_0: uint8, N x R x R x 3) and samples.json. Repeat the command\n"
        "to resume after an interruption; a larger --num-samples adds images to the same folder. A smaller one is\n"
        "refused, since the folder would hold more images than asked for.\n"
        "Several GPUs: torchrun --nproc-per-node=8 -m trainer sample ...\n"
        "A signal ends it with status 128 + n, such as 130 for Ctrl-C.\n"
        "Any config key of the run can be overridden: --section.key=value"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for opening a trained model."""
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="averaged (default) or raw weights")
    parser.add_argument("--step", type=int, help="checkpoint of a run folder (default: the newest)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp64"),
        help="precision (default: bf16 if the run trained in bf16 and this device multiplies in it, else fp32)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    for name in ("num_samples", "batch_size"):
        value = vars(arguments)[name]
        if value is not None and value < 1:
            raise configs.ConfigError(f"--{name.replace('_', '-')}={value}: expected at least 1")
    if arguments.guide and arguments.guidance_kind:
        raise configs.ConfigError(
            f"--guide={arguments.guide} replaces --guidance-kind={arguments.guidance_kind}: the guide is what sampling "
            "is guided away from; remove one"
        )
    from components.distributed import parallel

    world = parallel.join_world()
    try:
        with parallel.lost_rank_named(lambda: "while sampling"):
            return sample(arguments, overrides, world)
    finally:
        parallel.leave_world()


def sample(arguments: argparse.Namespace, overrides: list[str], world: World) -> int:
    from components.distributed.ranks import patient_ranks
    from components.files.lock import owned
    from trainer.commands.train import set_backends
    from trainer.models.sample_classes import check_guide, classes_for, left_out_of
    from trainer.models.sample_folder import SampleFolder, parse_labels
    from trainer.models.source import open_source
    from trainer.run.pictures import sampling_plan
    from trainer.run.prepare import autocast_dtype

    options = {"weights": arguments.weights, "overrides": overrides, "compiled": arguments.compile}
    source = open_source(arguments.source, world, step=arguments.step, **options)
    guide = None
    if arguments.guide:
        guide = open_source(arguments.guide, world, **options)
    set_backends(source.config)
    if arguments.precision is None:
        arguments.precision = "bf16" if autocast_dtype(source.config, world.device) else "fp32"
    plan = sampling_plan(source.config, arguments.seed, vars(arguments))
    if guide is not None:
        check_guide(source, guide)
    ranks = patient_ranks()
    classes = ranks.first(lambda: classes_for(arguments.labels, source))
    kind = parse_labels(arguments.labels, source.parts.num_classes, classes)
    source.parts.classes = classes
    if world.is_main and (left_out := left_out_of(kind, source.parts)):
        print(f"note: classes without images are left out: {', '.join(map(classes.shown, left_out))}", file=sys.stderr)
    sampler = make_sampler(source, guide, plan, arguments.precision)

    default = (source.run or Path(arguments.source).expanduser()) / "samples" / folder_name(arguments, source, plan)
    folder = SampleFolder(arguments.out or default)
    with owned(folder.path, "--out", ranks.first):
        fill(arguments, folder, sampler, source, guide, describe(arguments, source, guide, plan, kind), kind, world)
    return 0


def fill(
    arguments: argparse.Namespace,
    folder: SampleFolder,
    sampler: ImageSampler,
    source: LoadedModel,
    guide: LoadedModel | None,
    settings: dict[str, Any],
    kind: list[int] | str,
    world: World,
) -> None:
    """Draw what the folder lacks, then write grid and archive. Collective; rank 0 owns the folder."""
    from components.distributed.ranks import patient_ranks
    from components.finite import NotFiniteError

    ranks = patient_ranks()
    before = ranks.first(folder.settings)
    batch_size = arguments.batch_size or (before or {}).get("batch_size") or min(64, arguments.num_samples)
    about = {"num_samples": arguments.num_samples, "batch_size": batch_size}
    ranks.first(lambda: folder.begin(settings | about))
    missing = ranks.first(lambda: folder.missing(arguments.num_samples))
    faulty = draw(arguments, folder, sampler, missing, batch_size, kind, source.parts, world)
    faulty = sorted(i for rank in ranks.gather(faulty) for i in rank)  # a barrier: all ranks have written their files
    if faulty:
        raise NotFiniteError(unsound(faulty, arguments.num_samples, folder, source, guide))

    if world.is_main:
        written = [folder.write_grid(arguments.num_samples)]
        if not arguments.no_npz:
            written.append(folder.write_archive(arguments.num_samples, source.config.training.resolution))
        print(
            f"Done: {arguments.num_samples} images from {source.label} in {folder.path}/, "
            f"with {' and '.join(p.name for p in written)}.\n"
            f"Evaluate them: python -m trainer evaluate {folder.path} --reference=FOLDER_OR_NPZ"
        )


def draw(
    arguments: argparse.Namespace,
    folder: SampleFolder,
    sampler: ImageSampler,
    missing: set[int],
    batch_size: int,
    kind: list[int] | str,
    parts: Parts,
    world: World,
) -> list[int]:
    """Sample the missing images; returns the numbers of those that are not finite, which are not written.

    Batch boundaries do not depend on the rank count, so neither do the images. Ends at a batch without finite images.
    """
    from collections import Counter
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from tqdm import tqdm

    from components.data.pixels import to_uint8
    from components.finite import sound_rows
    from trainer.models.sample_folder import labels_of

    with_images = parts.classes.with_images(parts.num_classes)
    counts = Counter(i // batch_size for i in missing)
    batches = sorted(counts)
    bar = tqdm(total=len(missing), unit="image", disable=None if world.is_main else True, dynamic_ncols=True)
    with bar, ThreadPoolExecutor(4) as pool:
        writes, faulty = [], []
        for turn, first in enumerate(batches[world.rank :: world.size]):
            ids = range(first * batch_size, (first + 1) * batch_size)
            chosen = labels_of(ids, kind, with_images, arguments.seed, parts.classes.counts)
            labels = torch.tensor(chosen, device=world.device)
            condition = parts.sampling_condition(torch.tensor(ids), labels)
            with autocast(arguments.precision, world.device):
                images = sampler(ids, condition)
                sound = sound_rows(images)
                good = dict(zip(torch.tensor(ids)[sound.cpu()].tolist(), to_uint8(images[sound]).cpu()))
            faulty += sorted(missing.intersection(ids) - good.keys())
            for write in writes:  # of the previous batch: raises its errors, and bounds the queue
                write.result()
            writes = [pool.submit(folder.write, i, image) for i, image in good.items() if i in missing]
            if not good:
                break
            # Assume that the other ranks are equally far.
            bar.update(sum(counts[batch] for batch in batches[turn * world.size : (turn + 1) * world.size]))
        for write in writes:
            write.result()
    return faulty


def unsound(faulty: list[int], count: int, folder: SampleFolder, source: LoadedModel, guide: LoadedModel | None) -> str:
    """Message about samples that are not finite: how many, why if the weights show it, and what to do."""
    from components.finite import NotFiniteError, check_weights, count_of

    said = [count_of(faulty, count, "samples") + ", and none of these was written"]
    if left := len(folder.missing(count)) - len(faulty):
        said.append(f"{left} were not sampled, after a batch without a finite image")
    for loaded in filter(None, (source, guide)):
        try:
            named = loaded.parts.modules.named()
            check_weights({name: module.state_dict() for name, module in named.items()}, f"all of {loaded.label}")
        except NotFiniteError as error:
            said.append(str(error))
    return "; ".join(said) + (
        f". Choose another checkpoint (--step), --weights=online or --precision=fp32. {folder.path}/ keeps the "
        "finite ones; grid.png and samples.npz were not written"
    )


def make_sampler(source: LoadedModel, guide: LoadedModel | None, plan: SamplingPlan, precision: str) -> ImageSampler:
    from components.diffusion.image_sampler import ImageSampler
    from trainer.run.first_use import checked

    m = checked(source.parts.modules, source.parts.places)
    if precision == "fp64":
        for opened in filter(None, (source, guide)):
            for module in opened.parts.modules.named().values():
                module.double()
    try:
        other = guide.parts.modules.denoiser if guide else None
        return ImageSampler(plan, source.parts.recipe, m, source.parts.latent, other)
    except ValueError as error:
        raise configs.ConfigError(str(error)) from error


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def describe(
    arguments: argparse.Namespace,
    source: LoadedModel,
    guide: LoadedModel | None,
    plan: SamplingPlan,
    kind: list[int] | str,
) -> dict[str, Any]:
    """Settings that determine the images, their source, and index and name of the classes, for samples.json."""
    from trainer.models.sample_classes import left_out_of

    classes = source.parts.classes
    named = {str(i): name for i, name in enumerate(classes.names)}
    more: dict[str, Any] = {"classes": named} if named else {}
    if kind == "dataset":
        more["class_counts"] = list(classes.counts)
    elif left_out := left_out_of(kind, source.parts):
        more["classes_left_out"] = left_out
    return more | {
        "source": source.path,
        "run": str(source.run.absolute()) if source.run else None,
        "model": source.fingerprint,
        "step": source.step,
        "weights": source.weights,
        "guide": guide.fingerprint if guide else ("internal" if internal(plan) else None),
        "method": plan.method,
        "steps": plan.steps,
        "guidance": [plan.guidance.scale, plan.guidance.low, plan.guidance.high],
        "shift": plan.shift or source.parts.modules.flow.shift,
        "seed": plan.seed,
        "labels": kind,
        "num_classes": source.parts.num_classes,
        "resolution": source.config.training.resolution,
        "precision": arguments.precision,
    }


def internal(plan: SamplingPlan) -> bool:
    return plan.guidance.scale > 1 and plan.guidance.kind == "internal"


def folder_name(arguments: argparse.Namespace, source: LoadedModel, plan: SamplingPlan) -> str:
    """Folder name that encodes the sampling settings, but not the number of images."""
    g = plan.guidance
    words = [f"step{source.step}", source.weights, f"{plan.method}{plan.steps}"]
    if g.scale > 1:
        interval = "" if (g.low, g.high) == (0.0, 1.0) else f"_{g.low:g}-{g.high:g}"
        kind = "guide" if arguments.guide else "internal" if internal(plan) else "cfg"
        words.append(f"{kind}{g.scale:g}{interval}")
    if (shift := plan.shift or source.parts.modules.flow.shift) != 1:
        words.append(f"shift{shift:g}")
    if arguments.labels != "balanced":
        words.append("labels-" + re.sub(r"[^\w.,+-]", "_", arguments.labels)[:33])
    if arguments.precision != "fp32":
        words.append(arguments.precision)
    return "-".join([*words, f"seed{plan.seed}"])
