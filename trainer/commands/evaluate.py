"""python -m trainer evaluate: metrics of samples, or of a tokenizer's reconstructions."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config as configs

if TYPE_CHECKING:
    from components.distributed.parallel import World

SUMMARY = "compute FID, sFID, FDr6, MIND, IS, precision, recall of samples, or rFID, PSNR, SSIM, LPIPS of a tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "samples",
        nargs="?",
        metavar="SAMPLES|SOURCE",
        help="folder of PNG or JPEG images (as written by sample), or an .npz with arr_0; with --reconstruction: a run "
        "folder, a checkpoint, a model folder or a TOML config; none: only save the statistics of --reference",
    )
    parser.add_argument(
        "--reference",
        help="folder of images; the word dataset (that of the samples' run, or of --config); or an ADM reference batch "
        "or statistics file (.npz)",
    )
    parser.add_argument("--reconstruction", action="store_true", help="evaluate the source's tokenizer on its dataset")
    parser.add_argument(
        "--metrics",
        help="comma-separated, from fid,sfid,is,precision,recall,mind,fdr6; with --reconstruction from rfid,psnr,ssim,"
        "lpips (default: all but mind and fdr6; with --encoder: only those that do not need Inception)",
    )
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME[:key=value,...]",
        help="also compute the Frechet distance on this encoder, e.g. dinov2:size=l; may be repeated",
    )
    parser.add_argument("--inception-weights", default="", metavar="FILE", help="weights in torch-fidelity's layout")
    parser.add_argument(
        "--encoder-weights",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="weights file of one of FDr6's encoders, by the label after fd_ (dinov2_l_cls), instead of a download; "
        "may be repeated; of others: --encoder=NAME:checkpoint=FILE",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch and rank (default: 64)")
    parser.add_argument(
        "--max-images", "--images", type=int, default=0, help="use only the first N samples (default: all)"
    )
    parser.add_argument("--reference-images", type=int, default=0, help="the same for the reference (default: all)")
    parser.add_argument(
        "--reference-moments",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="take the reference moments of one network from an .npz with mu and sigma: inception, or the label after "
        "fd_ (dinov2_l_cls); may be repeated",
    )
    parser.add_argument(
        "--mind-images", type=int, default=5000, help="images of each side for MIND; 0: all (default: 5000)"
    )
    parser.add_argument(
        "--allow-singular", action="store_true", help="allow fewer images than features, with a warning"
    )
    parser.add_argument("--save-statistics", metavar="FILE", help="save the reference statistics for --reference")
    parser.add_argument("--config", metavar="TOML|RUN", help="source of the dataset for --reference=dataset")
    parser.add_argument("--output", metavar="FILE", help="results file (default: evaluation.json with the samples)")
    parser.add_argument("--weights", choices=("ema", "online"), default="ema", help="weights for --reconstruction")
    parser.add_argument("--step", type=int, help="checkpoint for --reconstruction (default: the newest)")
    parser.epilog = (
        "Repeat the command to resume an interrupted evaluation.\n"
        "Several GPUs: torchrun --nproc-per-node=8 -m trainer evaluate ...; the results do not change.\n"
        "Any config key can be overridden: --dataset.split=heldout\n"
        "docs/evaluation.md defines the metrics."
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    for name, least in (("batch_size", 1), ("max_images", 0), ("reference_images", 0), ("mind_images", 0)):
        if (value := vars(arguments)[name]) < least:
            option = f"--{name.replace('_', '-')}"
            raise configs.ConfigError(f"{option}={value}: expected at least {least}")
    if not arguments.reconstruction and not arguments.reference:
        raise configs.ConfigError(
            "--reference is missing: expected a folder of images, an .npz, or the word dataset (to evaluate a "
            "tokenizer, use --reconstruction, which needs no reference)"
        )
    if not arguments.samples and (arguments.reconstruction or not arguments.save_statistics):
        raise configs.ConfigError(
            "SAMPLES is missing: expected a folder of images or an .npz (with --save-statistics=FILE, none is needed)"
        )
    from components.distributed import parallel

    world = parallel.join_world()
    try:
        with parallel.lost_rank_named(lambda: "while evaluating"):
            evaluate(arguments, overrides, world)
        return 0
    finally:
        parallel.leave_world()


def evaluate(arguments: argparse.Namespace, overrides: list[str], world: World) -> None:
    """Run the command on one rank."""
    named = None if arguments.metrics is None else [w.strip() for w in arguments.metrics.split(",") if w.strip()]
    with contextlib.ExitStack() as stack:
        command = _reconstruction if arguments.reconstruction else _samples if arguments.samples else _statistics
        command(arguments, named, overrides, world, stack)


def _own_cache(stack: contextlib.ExitStack, output: Path) -> None:
    """Own the folder of the feature caches until the stack is closed, and then remove it if it is empty. Collective."""
    from components.distributed.ranks import Ranks
    from components.evaluation.features import FOLDER
    from components.files.lock import owned

    stack.callback(_remove_empty, output.parent / FOLDER)
    stack.enter_context(owned(output.parent / FOLDER, "--output", Ranks(None).first))


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _samples(
    arguments: argparse.Namespace,
    named: list[str] | None,
    overrides: list[str],
    world: World,
    stack: contextlib.ExitStack,
) -> None:
    from components.evaluation import EvaluationError
    from components.evaluation.comparison import compare
    from components.evaluation.images import first_images, open_images
    from components.evaluation.statistics import INCEPTION, compute_statistics
    from trainer.evaluation import results
    from trainer.evaluation.fdr6 import fdr6
    from trainer.evaluation.metric_selection import choose_metrics, make_networks
    from trainer.evaluation.references import open_reference, save_reference
    from trainer.models.sample_folder import SampleFolder

    settings = _sample_settings(arguments.samples)
    config = _config(arguments, settings, overrides)
    images, there = open_images(arguments.samples), Path(arguments.samples).expanduser()
    if there.is_dir() and len(images) < (wanted := settings.get("num_samples", 0)):
        raise EvaluationError(
            f"'{arguments.samples}' holds {len(images)} of {wanted} images: sampling was interrupted; repeat the "
            "sample command to resume"
        )
    if there.is_dir() and settings and len(images) > wanted and not arguments.max_images:
        raise EvaluationError(
            f"'{arguments.samples}' holds {len(images)} images, but samples.json lists {wanted}; remove the others, or "
            f"use the first ones: --max-images={wanted}"
        )
    images = first_images(images, arguments.max_images)
    default = [name for name in INCEPTION if name != "mind"]
    metrics = choose_metrics(named, arguments.encoder, (*INCEPTION, "fdr6"), default)
    resolution = images[0].shape[-1]
    networks = make_networks(
        metrics, arguments.encoder, arguments.inception_weights, resolution, world.device, arguments.encoder_weights
    )
    classes = SampleFolder(there.parent if there.is_file() else there).classes()
    moments = arguments.reference_moments
    reference = open_reference(arguments.reference, config, arguments.reference_images, classes, moments)
    reference.check(networks, len(images), arguments.allow_singular)

    default = there / "evaluation.json" if there.is_dir() else there.with_suffix(".evaluation.json")
    output = Path(arguments.output or default)
    common = {"batch_size": arguments.batch_size, "world": world}
    _own_cache(stack, output)
    ours, caches = compute_statistics(images, networks, output.parent, generated=True, **common)
    common |= {"generated": False, "known": [reference.known(m) for m in networks]}
    theirs, others = compute_statistics(reference.images, networks, output.parent, **common)
    if arguments.save_statistics and world.is_main:
        save_reference(arguments.save_statistics, networks, theirs)
    options = {"allow_singular": arguments.allow_singular, "mind_images": arguments.mind_images}
    values, warnings = compare(networks, ours, theirs, world.device, **options)
    if "fdr6" in metrics:
        values["fdr6"] = fdr6(values)
    warnings = reference.warnings(networks) + warnings
    if reference.images is not None and (size := reference.images[0].shape[-1]) != resolution:
        warnings.append(f"the reference images have {size} pixels per side, the samples {resolution}")
    if warning := reference.class_warning(settings.get("labels")):
        warnings.append(warning)
    about = {
        "samples": {"path": arguments.samples, "images": len(images), "settings": settings or None},
        "reference": {
            "path": arguments.reference,
            "images": len(reference.images) if reference.images is not None else None,
            "moments": arguments.reference_moments or None,
            "config": str(arguments.config or settings.get("run") or "") if arguments.reference == "dataset" else None,
        },
        "networks": {m.label or "inception": m.network.about for m in networks},
        "batch_size": arguments.batch_size,
        "mind_images": arguments.mind_images if "mind" in metrics else None,
    }
    title = f"{arguments.samples}: {len(images)} images against {arguments.reference}"
    run_folder = Path(settings["run"]) if settings.get("run") else None
    step = settings.get("step", 0)
    results.publish(title, output, values, warnings, about, caches + others, run_folder, there.name, step)


def _statistics(
    arguments: argparse.Namespace,
    named: list[str] | None,
    overrides: list[str],
    world: World,
    stack: contextlib.ExitStack,
) -> None:
    """Compute and save the moments of the reference, without samples."""
    from components.evaluation import EvaluationError
    from components.evaluation.statistics import FRECHET, compute_statistics
    from trainer.evaluation.metric_selection import choose_metrics, make_networks
    from trainer.evaluation.references import open_reference, save_reference

    known = ("fid", "sfid", "fdr6")
    metrics = choose_metrics(named, arguments.encoder, known, [name for name in known if name in FRECHET])
    reference = open_reference(arguments.reference, _config(arguments, {}, overrides), arguments.reference_images)
    if reference.images is None:
        raise EvaluationError(f"--reference={arguments.reference} holds no images to compute statistics of")
    resolution = reference.images[0].shape[-1]
    networks = make_networks(
        metrics, arguments.encoder, arguments.inception_weights, resolution, world.device, arguments.encoder_weights
    )
    output = Path(arguments.save_statistics)
    _own_cache(stack, output)
    common = {"batch_size": arguments.batch_size, "world": world, "generated": False}
    statistics, caches = compute_statistics(reference.images, networks, output.parent, **common)
    if world.is_main:
        save_reference(output, networks, statistics)
        for cache in caches:
            cache.remove()
        labels = ", ".join(m.label or "inception" for m in networks)
        print(f"statistics of {len(reference.images)} images ({labels}) written to {output}", flush=True)


def _reconstruction(
    arguments: argparse.Namespace,
    named: list[str] | None,
    overrides: list[str],
    world: World,
    stack: contextlib.ExitStack,
) -> None:
    from components.evaluation.images import first_images
    from trainer.evaluation import results
    from trainer.evaluation.metric_selection import choose_metrics, make_networks
    from trainer.evaluation.references import dataset_images
    from trainer.evaluation.tokenizer_quality import METRICS, evaluate_reconstruction, make_metric
    from trainer.models.source import open_source

    if arguments.encoder_weights:
        raise configs.ConfigError("--encoder-weights is for --metrics=fdr6, which --reconstruction does not compute")
    for option in ("reference", "reference_moments", "config", "save_statistics"):
        if vars(arguments)[option]:
            raise configs.ConfigError(
                f"--{option.replace('_', '-')} cannot be used with --reconstruction: the reference is the source's "
                "own dataset (--dataset.KEY=VALUE changes it)"
            )
    metrics = choose_metrics(named, (), METRICS, METRICS)
    if arguments.metrics is None and arguments.encoder:
        metrics = ("psnr", "ssim")  # the metrics that need no weight files
    source = open_source(
        arguments.samples,
        world,
        weights=arguments.weights,
        step=arguments.step,
        overrides=overrides,
        needs=("tokenizer",),
    )
    images = first_images(dataset_images(source.config), arguments.max_images)
    inception = ("fid",) if "rfid" in metrics else ()
    networks = make_networks(
        inception, arguments.encoder, arguments.inception_weights, source.config.training.resolution, world.device
    )
    lpips = make_metric("lpips", source.config, world.device) if "lpips" in metrics else None
    there = Path(arguments.samples).expanduser()
    folder = source.run or (there if there.is_dir() else Path(source.config.run.dir))
    output = Path(arguments.output or folder / "reconstruction.json")
    _own_cache(stack, output)
    values, warnings, caches = evaluate_reconstruction(
        source.parts.modules.tokenizer,
        images,
        metrics,
        networks,
        lpips,
        output.parent,
        batch_size=arguments.batch_size,
        world=world,
        allow_singular=arguments.allow_singular,
    )
    about = {
        "source": {"path": arguments.samples, "step": source.step, "weights": source.weights},
        "dataset": {**source.config.dataset.model_dump(), "images": len(images)},
        "networks": {m.label or "inception": m.network.about for m in networks},
        "batch_size": arguments.batch_size,
    }
    title = f"{source.label}: reconstructions of {len(images)} images of {images.name}"
    results.publish(title, output, values, warnings, about, caches, source.run, "reconstruction", source.step)


def _sample_settings(path: str) -> dict[str, Any]:
    """Contents of the ``samples.json`` of a sample folder or beside an ``.npz``; empty if there is none.

    Raises:
        EvaluationError: ``path`` is a run folder.
    """
    from components.evaluation import EvaluationError
    from trainer.models.sample_folder import SETTINGS, SampleFolder

    there = Path(path).expanduser()
    settings = SampleFolder(there.parent if there.is_file() else there).settings() or {}
    if not settings and (there / "checkpoints").is_dir():
        listed = "".join(f"\n  {p.parent}" for p in sorted(there.glob(f"samples/*/{SETTINGS}")))
        raise EvaluationError(
            f"'{path}' is a run folder; "
            + (f"name one of its sample folders:{listed}" if listed else "sample from it first")
            + f"\n(python -m trainer sample {path}; to evaluate its tokenizer: --reconstruction)"
        )
    return settings


def _config(arguments: argparse.Namespace, settings: dict[str, Any], overrides: list[str]) -> configs.Config | None:
    """Config that defines plugins and dataset: from --config, else from the samples' run or source, else None."""
    from components import registry

    found = None
    places = [arguments.config] if arguments.config else [settings.get("run"), settings.get("source")]
    for place in filter(None, places):
        there = Path(place).expanduser()
        if there.suffix == ".toml":
            found = configs.load(place, overrides, named=bool(arguments.config))
        elif (there / "config.toml").is_file():
            found = configs.loads((there / "config.toml").read_text(), str(there / "config.toml"), overrides)
        if found is not None:
            return found
    if arguments.config:
        raise configs.ConfigError(f"--config={arguments.config}: expected a TOML file, a run folder or a model folder")
    if overrides:
        raise configs.ConfigError(f"'{overrides[0]}' is not an option of evaluate, and there is no config to override")
    registry.discover("plugins")
    return None
