"""Evaluation of sample images against a reference: feature extraction, statistics, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.distributed.parallel import World
from components.evaluation import EvaluationError
from components.evaluation.extract import extract
from components.evaluation.feature_cache import FeatureCache
from components.evaluation.frechet import few_images
from components.evaluation.images import Images
from components.evaluation.measures import FRECHET, Summarizer, Summary, compare, needs_neighbors
from components.evaluation.moments import save_statistics
from components.evaluation.precision_recall import NEIGHBORS
from trainer.evaluation.measured import Measured, network_warnings
from trainer.evaluation.references import Reference


def check_counts(networks: Sequence[Measured], samples: int, reference: Reference, allow_singular: bool) -> None:
    """Check before any computation that every metric can be computed.

    Raises:
        EvaluationError: there are too few images, or the reference lacks what a metric needs.
    """
    problems = []
    for m in networks:
        for metric in m.metrics:
            if metric not in FRECHET:
                continue
            feature = FRECHET[metric]
            dim, kept = m.network.dims[feature], reference.moments(m, feature)
            if kept is None and reference.images is None:
                there = ", ".join(f"mu{e}" for e in reference.statistics)
                problems.append(f"{m.name(metric)}: '{reference.name}' holds neither images nor mu{m.ending(feature)}, "
                                f"only {there}")  # fmt: skip
                continue
            few = [few_images(samples, dim, "the samples")]
            few.append(few_images(kept.count if kept else len(reference.images), dim, "the reference"))
            if any(few) and not allow_singular:
                problems += [f"{m.name(metric)}: {text}" for text in few if text]
        if needs_neighbors(m.metrics) and reference.images is None:
            problems.append(
                f"precision, recall: '{reference.name}' holds statistics only, but these metrics need reference "
                "images; remove them from --metrics, or use a reference with images"
            )
        elif needs_neighbors(m.metrics) and min(samples, len(reference.images)) <= NEIGHBORS:
            problems.append(f"precision, recall: need more than {NEIGHBORS} samples and reference images")
    if problems:
        raise EvaluationError(
            "\n".join(problems) + "\nUse more images, other metrics, or an encoder with fewer features; or accept a "
            "value with a warning: --allow-singular, or evaluation.allow_singular = true in a config"
        )


def summarize(
    images: Images,
    networks: Sequence[Measured],
    place: Path,
    *,
    batch_size: int,
    world: World,
    generated: bool,
    title: str,
) -> tuple[list[Summary], list[FeatureCache]]:
    """Summarize the features of ``images`` under each network. Collective.

    Args:
        images: to summarize.
        networks: feature networks and their metrics.
        place: folder for the feature caches.
        batch_size: images per batch and rank.
        world: this process.
        generated: True for samples, False for the reference.
        title: label of the progress bar.

    Returns:
        One summary per network, and the feature caches, to remove at the end.
    """
    found, caches = [], []
    for m in networks:
        cache = FeatureCache(place, {"images": images.identity, "network": m.identity, "batch_size": batch_size})
        summarizer = Summarizer(m.network, m.metrics, world.device, generated=generated, main=world.is_main)
        named = f"{title}, {m.label or 'inception'}"
        for values in extract(images, m.network, cache, batch_size=batch_size, device=world.device, title=named):
            summarizer.add(values)
            if not world.is_main and not needs_neighbors(m.metrics):
                break
        found.append(summarizer.summary())
        caches.append(cache)
    return found, caches


def evaluate_samples(
    samples: Images,
    reference: Reference,
    networks: Sequence[Measured],
    place: Path,
    *,
    batch_size: int,
    world: World,
    allow_singular: bool = False,
    keep_statistics: str | None = None,
) -> tuple[dict[str, float | None], list[str], list[FeatureCache]]:
    """Compute metrics of samples against a reference. Collective.

    Args:
        samples: images to evaluate.
        reference: images or statistics to compare with.
        networks: feature networks and their metrics.
        place: folder for the feature caches, from which an interrupted evaluation resumes.
        batch_size: images per batch and rank; affects the values only through rounding in the networks.
        world: this process.
        allow_singular: compute distances with fewer images than features, with a warning.
        keep_statistics: file to save the reference's moments to.

    Returns:
        Values and warnings, the same on every rank, and the feature caches, to remove once the values are written.

    Raises:
        EvaluationError: there are too few images, or an image cannot be read.
    """
    check_counts(networks, len(samples), reference, allow_singular)
    common = {"batch_size": batch_size, "world": world}
    summaries, caches = summarize(samples, networks, place, generated=True, title="samples", **common)
    references, others = summarize_reference(reference, networks, place, **common)
    if keep_statistics and world.is_main:
        write_statistics(keep_statistics, networks, references)
    values: dict[str, float | None] = {}
    warnings = network_warnings(networks) + reference.warnings(networks)
    for m, a, b in zip(networks, summaries, references):
        found, said = compare(
            m.metrics, a, b, world.device, allow_singular=allow_singular, names=("the samples", "the reference")
        )
        values |= {m.name(metric): value for metric, value in found.items()}
        warnings += [f"{m.name(metric)}: {text}" for metric, text in said]
    return values, warnings, caches + others


def summarize_reference(
    reference: Reference, networks: Sequence[Measured], place: Path, *, batch_size: int, world: World
) -> tuple[list[Summary], list[FeatureCache]]:
    """Like :func:`summarize`, for a reference; uses its statistics instead of images where it has them. Collective."""
    found, caches = [], []
    for m in networks:
        kept = {FRECHET[x]: reference.moments(m, FRECHET[x]) for x in m.metrics if x in FRECHET}
        kept = {feature: g for feature, g in kept.items() if g is not None}
        wanted = tuple(x for x in m.metrics if x != "is" and FRECHET.get(x) not in kept)
        summary = Summary()
        if wanted:
            rest = [Measured(m.label, m.network, wanted)]
            common = {"batch_size": batch_size, "world": world, "generated": False, "title": "reference"}
            (summary,), used = summarize(reference.images, rest, place, **common)
            caches += used
        summary.moments |= kept
        found.append(summary)
    return found, caches


def write_statistics(path: str, networks: Sequence[Measured], references: Sequence[Summary]) -> None:
    """Save the moments of a reference to a file that ``--reference`` accepts."""
    statistics = {m.ending(name): g for m, s in zip(networks, references) for name, g in s.moments.items()}
    save_statistics(path, statistics, {m.label: m.network.about for m in networks})
