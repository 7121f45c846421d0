"""python -m trainer evaluate: metrics of samples, or of a tokenizer's reconstructions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import config as configs

if TYPE_CHECKING:
    from components.distributed.parallel import World
    from components.evaluation.feature_cache import FeatureCache

SUMMARY = "compute FID, sFID, IS, precision, recall of samples, or rFID, PSNR, SSIM, LPIPS of a tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "samples",
        metavar="SAMPLES|SOURCE",
        help="folder of PNG or JPEG images (as written by sample), or an .npz with arr_0; with --reconstruction: a run "
        "folder, a checkpoint, a model folder or a TOML config",
    )
    parser.add_argument(
        "--reference",
        help="folder of images; the word dataset (that of the samples' run, or of --config); or an ADM reference batch "
        "or statistics file (.npz)",
    )
    parser.add_argument("--reconstruction", action="store_true", help="evaluate the source's tokenizer on its dataset")
    parser.add_argument(
        "--metrics",
        help="comma-separated, from fid,sfid,is,precision,recall; with --reconstruction from rfid,psnr,ssim,lpips "
        "(default: all; with --encoder: only those that do not need Inception)",
    )
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME[:key=value,...]",
        help="also compute the Frechet distance on this encoder, e.g. dinov2:size=l; may be repeated",
    )
    parser.add_argument("--inception-weights", default="", metavar="FILE", help="weights in torch-fidelity's layout")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch and rank (default: 64)")
    parser.add_argument(
        "--max-images", "--images", type=int, default=0, help="use only the first N samples (default: all)"
    )
    parser.add_argument("--reference-images", type=int, default=0, help="the same for the reference (default: all)")
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
    for name, least in (("batch_size", 1), ("max_images", 0), ("reference_images", 0)):
        if getattr(arguments, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise configs.ConfigError(f"{option}={getattr(arguments, name)}: expected at least {least}")
    if not arguments.reconstruction and not arguments.reference:
        raise configs.ConfigError(
            "--reference is missing: expected a folder of images, an .npz, or the word dataset (to evaluate a "
            "tokenizer, use --reconstruction, which needs no reference)"
        )
    from components.distributed import parallel

    world = parallel.join_world()
    try:
        with parallel.lost_rank_named(lambda: "while evaluating"):
            evaluate(arguments, overrides, world)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to resume", file=sys.stderr)
        return 130
    finally:
        parallel.leave_world()


def evaluate(arguments: argparse.Namespace, overrides: list[str], world: World) -> None:
    """Run the command on one rank."""
    (_reconstruction if arguments.reconstruction else _samples)(arguments, overrides, world)


def _samples(arguments: argparse.Namespace, overrides: list[str], world: World) -> None:
    from components.evaluation.images import First
    from components.evaluation.measures import INCEPTION
    from trainer.evaluation.comparison import evaluate_samples
    from trainer.evaluation.measured import chosen_metrics, make_networks
    from trainer.evaluation.references import open_reference, open_samples

    images, settings = open_samples(arguments.samples)
    if arguments.max_images:
        images = First(images, arguments.max_images)
    config = _config(arguments, settings, overrides)
    reference = open_reference(arguments.reference, config, arguments.reference_images)
    metrics = chosen_metrics(_words(arguments.metrics), arguments.encoder, INCEPTION)
    resolution = images[0].shape[-1]
    networks = make_networks(metrics, arguments.encoder, arguments.inception_weights, resolution, world.device)
    there = Path(arguments.samples).expanduser()
    default = there / "evaluation.json" if there.is_dir() else there.with_suffix(".evaluation.json")
    output = Path(arguments.output or default)
    values, warnings, caches = evaluate_samples(
        images,
        reference,
        networks,
        output.parent,
        batch_size=arguments.batch_size,
        world=world,
        allow_singular=arguments.allow_singular,
        keep_statistics=arguments.save_statistics,
    )
    if reference.images is not None and (size := reference.images[0].shape[-1]) != resolution:
        warnings.append(f"the reference images have {size} pixels per side, the samples {resolution}")
    about = {
        "samples": {"path": arguments.samples, "images": len(images), "settings": settings or None},
        "reference": {
            "path": arguments.reference,
            "images": len(reference.images) if reference.images is not None else None,
            "config": str(arguments.config or settings.get("run") or "") if arguments.reference == "dataset" else None,
        },
        "networks": {m.label or "inception": m.network.about for m in networks},
        "batch_size": arguments.batch_size,
    }
    title = f"{arguments.samples}: {len(images)} images against {arguments.reference}"
    run_folder = Path(settings["run"]) if settings.get("run") else None
    _finish(title, output, values, warnings, about, caches, run_folder, there.name, settings.get("step", 0))


def _reconstruction(arguments: argparse.Namespace, overrides: list[str], world: World) -> None:
    from components.evaluation.images import First
    from trainer.evaluation.measured import Measured, chosen_metrics, make_networks
    from trainer.evaluation.reconstruction import METRICS, evaluate_reconstruction, make_lpips
    from trainer.evaluation.references import dataset_images
    from trainer.models.source import open_source

    for option in ("reference", "config", "save_statistics"):
        if getattr(arguments, option):
            raise configs.ConfigError(
                f"--{option.replace('_', '-')} cannot be used with --reconstruction: the reference is the source's "
                "own dataset (--dataset.KEY=VALUE changes it)"
            )
    metrics = chosen_metrics(_words(arguments.metrics), (), METRICS)
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
    images = dataset_images(source.config)
    if arguments.max_images:
        images = First(images, arguments.max_images)
    inception = ("fid",) if "rfid" in metrics else ()
    networks: list[Measured] = make_networks(
        inception, arguments.encoder, arguments.inception_weights, source.config.training.resolution, world.device
    )
    lpips = make_lpips(source.config, world.device) if "lpips" in metrics else None
    there = Path(arguments.samples).expanduser()
    folder = source.run or (there if there.is_dir() else Path(source.config.run.dir))
    output = Path(arguments.output or folder / "reconstruction.json")
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
    _finish(title, output, values, warnings, about, caches, source.run, "reconstruction", source.step)


def _finish(
    title: str,
    output: Path,
    values: dict[str, float | None],
    warnings: list[str],
    about: dict[str, Any],
    caches: list[FeatureCache],
    run_folder: Path | None,
    setting: str,
    step: int,
) -> None:
    """Print and write the results, then delete the feature caches that serve to resume an evaluation."""
    from components.distributed.ranks import Ranks
    from trainer.evaluation import report

    def write() -> None:
        report.write_json(output, values, warnings, about)
        lines = [title, report.table(values, warnings), f"written to {output}"]
        if run_folder is not None and run_folder.is_dir():
            lines.append(f"and to {report.write_curves(run_folder, setting, step, values)}")
        for cache in caches:
            cache.remove()
        print("\n".join(lines), flush=True)

    Ranks(None).first(write)


def _config(arguments: argparse.Namespace, settings: dict[str, Any], overrides: list[str]) -> configs.Config | None:
    """Config that defines plugins and dataset: from --config, else from the samples' run or source, else None."""
    from components import registry

    found = None
    places = [arguments.config] if arguments.config else [settings.get("run"), settings.get("source")]
    for place in filter(None, places):
        there = Path(place).expanduser()
        if there.suffix == ".toml":
            found = configs.load(place, overrides)
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


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
