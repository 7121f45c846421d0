"""Images against a reference: what is measured of each, in which order, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from components.distributed.parallel import World
from components.evaluation import EvaluationError
from components.evaluation.extract import extract
from components.evaluation.feature_cache import FeatureCache
from components.evaluation.frechet import few_images
from components.evaluation.images import Images
from components.evaluation.measures import FRECHET, Summariser, Summary, compare, needs_neighbours
from components.evaluation.moments import save_statistics
from components.evaluation.precision_recall import NEIGHBOURS
from trainer.evaluation.measured import Measured, network_warnings
from trainer.evaluation.references import Reference


def check_counts(networks: Sequence[Measured], samples: int, reference: Reference, allow_singular: bool) -> None:
    """Finds what would be refused at the end before anything is computed.

    Raises:
        EvaluationError: too few images, or nothing to compare with.
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
                problems.append(f"{m.name(metric)}: '{reference.name}' has no images and no mu{m.ending(feature)}; "
                                f"it holds {there}")  # fmt: skip
                continue
            few = [few_images(samples, dim, "the samples")]
            few.append(few_images(kept.count if kept else len(reference.images), dim, "the reference"))
            if any(few) and not allow_singular:
                problems += [f"{m.name(metric)}: {text}" for text in few if text]
        if needs_neighbours(m.metrics) and reference.images is None:
            problems.append(
                f"precision, recall: '{reference.name}' holds statistics only, but these compare image with image; "
                "leave them out of --metrics, or give a reference with images"
            )
        elif needs_neighbours(m.metrics) and min(samples, len(reference.images)) <= NEIGHBOURS:
            problems.append(f"precision, recall: they need more than {NEIGHBOURS} images on both sides")
    if problems:
        raise EvaluationError(
            "\n".join(problems) + "\nGive more images, choose other metrics or an encoder of fewer features; a number "
            "with a warning: --allow-singular, in a config evaluation.allow_singular = true"
        )


def summarise(
    images: Images,
    networks: Sequence[Measured],
    place: Path,
    *,
    batch_size: int,
    world: World,
    generated: bool,
    title: str,
) -> tuple[list[Summary], list[FeatureCache]]:
    """One summary per network, and the caches to remove at the end. Collective.

    Args:
        images: to look at.
        networks: through what.
        place: folder for the caches.
        batch_size: images at once.
        world: this process.
        generated: whether they are the samples.
        title: on the progress bar.
    """
    found, caches = [], []
    for m in networks:
        cache = FeatureCache(place, {"images": images.identity, "network": m.identity, "batch_size": batch_size})
        summariser = Summariser(m.network, m.metrics, world.device, generated=generated, main=world.is_main)
        named = f"{title}, {m.label or 'inception'}"
        for values in extract(images, m.network, cache, batch_size=batch_size, device=world.device, title=named):
            summariser.add(values)
            if not world.is_main and not needs_neighbours(m.metrics):
                break
        found.append(summariser.summary())
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
    """Values and warnings, the same on every rank, and the caches, which may go once the values are written.

    Collective.

    Args:
        samples: images in question.
        reference: what they are compared with.
        networks: and what is wanted of each.
        place: folder for what an interrupted evaluation keeps.
        batch_size: images at once on each rank; the numbers do not depend on it but for the networks' rounding.
        world: this process.
        allow_singular: numbers for fewer images than features, with a warning.
        keep_statistics: file for the reference's moments.

    Raises:
        EvaluationError: too few images; an image that cannot be read.
    """
    check_counts(networks, len(samples), reference, allow_singular)
    common = {"batch_size": batch_size, "world": world}
    summaries, caches = summarise(samples, networks, place, generated=True, title="samples", **common)
    references, others = summarise_reference(reference, networks, place, **common)
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


def summarise_reference(
    reference: Reference, networks: Sequence[Measured], place: Path, *, batch_size: int, world: World
) -> tuple[list[Summary], list[FeatureCache]]:
    """As :func:`summarise`; what statistics say is not measured again. Collective."""
    found, caches = [], []
    for m in networks:
        kept = {FRECHET[x]: reference.moments(m, FRECHET[x]) for x in m.metrics if x in FRECHET}
        kept = {feature: g for feature, g in kept.items() if g is not None}
        wanted = tuple(x for x in m.metrics if x != "is" and FRECHET.get(x) not in kept)
        summary = Summary()
        if wanted:
            rest = [Measured(m.label, m.network, wanted)]
            common = {"batch_size": batch_size, "world": world, "generated": False, "title": "reference"}
            (summary,), used = summarise(reference.images, rest, place, **common)
            caches += used
        summary.moments |= kept
        found.append(summary)
    return found, caches


def write_statistics(path: str, networks: Sequence[Measured], references: Sequence[Summary]) -> None:
    """A file that ``--reference`` takes."""
    statistics = {m.ending(name): g for m, s in zip(networks, references) for name, g in s.moments.items()}
    save_statistics(path, statistics, {m.label: m.network.about for m in networks})
