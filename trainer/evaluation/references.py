"""The reference that samples are compared with: images or statistics, and statistics files in ADM's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.data.classes import Classes
from components.evaluation import EvaluationError
from components.evaluation.images import DatasetImages, ImageFiles, ImageSet, NpzImages, first_images
from components.evaluation.precision_recall import NEIGHBORS
from components.evaluation.statistics import FRECHET, SUFFIXES, FeatureStatistics, Gaussian, NetworkMetrics, few_images
from components.files.atomic import atomic_write
from components.finite import count_of, faulty_rows
from trainer.config import Config, ConfigError
from trainer.run.construct import make_dataset


@dataclass
class Reference:
    """Reference that samples are compared with.

    Attributes:
        name: as the user wrote it.
        images: reference images, or None if there are only statistics.
        statistics: precomputed moments by key suffix; they take precedence over images.
        about: networks that the statistics were computed with, by label; none for those of unknown ones (ADM's files).
        classes: of the dataset, if the reference is one.
        given: labels of the networks whose moments were given separately.
    """

    name: str
    images: ImageSet | None = None
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    classes: Classes = field(default_factory=Classes)
    given: list[str] = field(default_factory=list)

    def known(self, m: NetworkMetrics) -> dict[str, Gaussian]:
        """Precomputed moments by feature name, of those that a network's metrics need.

        Raises:
            ConfigError: the statistics were computed with another network.
        """
        found = {name: self.statistics[m.suffix(name)] for name in m.features if m.suffix(name) in self.statistics}
        if found and m.label in self.about:
            theirs = {key: value for key, value in self.about[m.label].items() if key != "file"}
            if theirs != m.identity:
                raise ConfigError(
                    f"the statistics of '{self.name}' were computed with another network:\n  file: {theirs}\n"
                    f"  here: {m.identity}\nUse the same network, or compute the statistics again"
                )
        return found

    def check(self, networks: Sequence[NetworkMetrics], samples: int, allow_singular: bool) -> None:
        """Check before any computation that every metric of ``samples`` images can be computed.

        Raises:
            EvaluationError: there are too few images, or the reference lacks what a metric needs.
            ConfigError: see :meth:`known`.
        """
        problems = []
        labels = [m.label for m in networks]
        if unused := [label for label in self.given if label not in labels]:
            raise ConfigError(
                f"--reference-moments={unused[0] or 'inception'}=...: no such network among those of the metrics; "
                f"expected one of: {', '.join(label or 'inception' for label in labels)}"
            )
        for m in networks:
            known = self.known(m)
            for metric, feature in ((x, FRECHET[x]) for x in m.metrics if x in FRECHET):
                if feature not in known and self.images is None:
                    there = ", ".join(f"mu{suffix}" for suffix in self.statistics)
                    problems.append(f"{m.name(metric)}: '{self.name}' holds neither images nor mu{m.suffix(feature)}, "
                                    f"only {there}")  # fmt: skip
                    continue
                dim, count = m.network.dims[feature], known[feature].count if feature in known else len(self.images)
                few = few_images(samples, dim, "the samples"), few_images(count, dim, "the reference")
                if not allow_singular:
                    problems += [f"{m.name(metric)}: {text}" for text in few if text]
            for feature, g in known.items():
                if len(g.mean) != m.network.dims[feature]:
                    problems.append(
                        f"{m.label or 'inception'}: '{self.name}' holds moments of {len(g.mean)} features, but this "
                        f"network has {m.network.dims[feature]}"
                    )
            if "mind" in m.metrics and self.images is None:
                problems.append(
                    f"mind: '{self.name}' holds statistics only, but MIND needs reference images; remove it from "
                    "--metrics, or use a reference with images"
                )
            if m.needs_neighbors and self.images is None:
                problems.append(
                    f"precision, recall: '{self.name}' holds statistics only, but these metrics need reference "
                    "images; remove them from --metrics, or use a reference with images"
                )
            elif m.needs_neighbors and min(samples, len(self.images)) <= NEIGHBORS:
                problems.append(f"precision, recall: need more than {NEIGHBORS} samples and reference images")
        if problems:
            raise EvaluationError(
                "\n".join(problems) + "\nUse more images, other metrics, or an encoder with fewer features; or accept "
                "a value with a warning: --allow-singular, or evaluation.allow_singular = true in a config"
            )

    def class_warning(self, labels: Any) -> str:
        """Warning if samples have each class equally often, but the reference does not; otherwise ""."""
        counts = [count for count in self.classes.counts if count]
        if labels not in ("balanced", "random") or not counts or max(counts) < 2 * min(counts):
            return ""
        return (
            f"the samples have each class equally often ({labels} labels), but some classes of the reference have "
            f"{max(counts) / min(counts):.1f} times as many images as others, which raises FID for no fault of the "
            "model; sample with --labels=dataset"
        )

    def warnings(self, networks: Sequence[NetworkMetrics]) -> list[str]:
        """Warnings to show with the values: weights that are not the published ones, or statistics of unknown ones."""
        ours = [m.network.about for m in networks if m.network.about.get("published") is False]
        found = [
            f"these are NOT the published Inception weights but {about['file']} (sha256 {about['sha256'][:8]}): FID "
            "and related metrics are not comparable with published values"
            for about in ours
        ]
        if ours and "" not in self.about and any(suffix in self.statistics for suffix in SUFFIXES.values()):
            found.append(
                f"'{self.name}' does not state the network of its statistics; ADM's belong to the published one"
            )
        return found


def open_reference(
    path: str, config: Config | None, count: int, classes: Classes = Classes(), moments: Sequence[str] = ()
) -> Reference:
    """Open the reference: an image folder, the word "dataset", an ADM reference batch or a statistics file.

    Args:
        path: as the user wrote it.
        config: defines the dataset, for "dataset".
        count: use at most this many images; 0: all.
        classes: of the samples, which those of "dataset" must equal.
        moments: "LABEL=FILE": a file whose mu and sigma are the moments of the network with that label, "inception" for
            Inception; they take precedence.

    Raises:
        EvaluationError: the path holds no reference, or a file no moments; states what is allowed.
        ConfigError: "dataset" without a config, or with other classes.
    """
    reference = _open(path, config, count, classes)
    for word in moments:
        label, equals, file = word.partition("=")
        if not equals or not label or not Path(file).expanduser().is_file():
            raise ConfigError(f"--reference-moments={word}: expected LABEL=FILE, such as inception=adm.npz")
        label = "" if label == "inception" else label
        found, about = read_statistics(Path(file).expanduser())
        suffix = f"_{label}" if label else ""
        key = suffix if suffix in found else ""
        if key not in found:
            raise EvaluationError(f"'{file}' holds neither mu and sigma nor mu{suffix} and sigma{suffix}")
        reference.statistics[suffix] = found[key]
        if not label:
            reference.statistics |= {spatial: found[spatial] for spatial in SUFFIXES.values() if spatial in found}
        reference.given.append(label)
        reference.about.pop(label, None)
        if suffix in found and label in about:
            reference.about[label] = about[label]
    return reference


def _open(path: str, config: Config | None, count: int, classes: Classes) -> Reference:
    if path == "dataset":
        if config is None:
            raise ConfigError("--reference=dataset: the samples name no run; add --config=TOML_OR_RUN")
        images = dataset_images(config)
        found = Classes.of(images.dataset)
        if changed := classes.difference(found):
            raise ConfigError(
                f"--reference=dataset: its classes differ from those of the samples (samples -> dataset): {changed}; "
                "name the dataset that the model was trained on (--config, --dataset.KEY=VALUE), or a folder of images"
            )
        return Reference(path, first_images(images, count), classes=found)
    there = Path(path).expanduser()
    if there.suffix == ".npz" and there.is_file():
        statistics, about = read_statistics(there)
        with np.load(there, allow_pickle=False) as file:
            has_images = "arr_0" in file.files
        if not has_images and not statistics:
            raise EvaluationError(f"'{path}' holds neither images (arr_0) nor statistics (mu, sigma)")
        images = first_images(NpzImages(there), count) if has_images else None
        return Reference(path, images, statistics, about)
    if not there.is_dir():
        raise EvaluationError(
            f"--reference={path} does not exist; expected a folder of images, an .npz with arr_0 or with mu and "
            "sigma, or the word dataset"
        )
    return Reference(path, first_images(ImageFiles(there), count))


def dataset_images(config: Config, dataset: Any = None) -> DatasetImages:
    """Images of a config's dataset.

    Args:
        config: names the dataset.
        dataset: the dataset, if it is built already. Unreadable images are then replaced by others, as in training;
            otherwise they are errors.
    """
    strict = dataset is None
    if dataset is None:
        dataset = make_dataset(config)
    identity = f"{config.dataset.model_dump()} {config.training.resolution}"
    return DatasetImages(dataset, f"dataset {config.dataset.name}", identity, strict)


def save_reference(
    path: str | Path, networks: Sequence[NetworkMetrics], statistics: Sequence[FeatureStatistics]
) -> None:
    """Save the moments of a reference under each network to a file that ``--reference`` accepts."""
    named = {m.suffix(name): g for m, s in zip(networks, statistics) for name, g in s.moments.items()}
    save_statistics(path, named, {m.label: m.network.about for m in networks})


def save_statistics(path: str | Path, statistics: dict[str, Gaussian], about: dict[str, Any]) -> None:
    """Atomically write an ``.npz`` file with ``mu``, ``sigma`` and ``count`` of each set of features.

    Args:
        path: the file.
        statistics: moments by key suffix: "" for Inception's pool features and "_s" for its spatial ones, as in ADM's
            reference batches.
        about: description of the features; stored as JSON under ``about``.
    """
    arrays: dict[str, Any] = {"about": np.array(json.dumps(about))}
    for ending, g in statistics.items():
        arrays |= {f"mu{ending}": g.mean.cpu().numpy(), f"sigma{ending}": g.covariance.cpu().numpy()}
        if g.count is not None:
            arrays[f"count{ending}"] = np.array(g.count)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, concurrent=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: str | Path) -> tuple[dict[str, Gaussian], dict[str, Any]]:
    """Read moments by key suffix, and the networks that they were computed with by label, as far as the file says.

    Reads files from :func:`save_statistics`, ADM's suite (mu, sigma, mu_s, sigma_s) and others with mu and sigma, such
    as JiT's, or ref_mu and ref_sigma.

    Raises:
        EvaluationError: the file cannot be read, or the shapes of its arrays do not match.
    """
    found: dict[str, Gaussian] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                start, mu, ending = key.partition("mu")
                if not mu or start not in ("", "ref_") or f"{start}sigma{ending}" not in file.files:
                    continue
                names = (f"{start}{k}{ending}" for k in ("mu", "sigma"))
                mean, covariance = (torch.from_numpy(np.atleast_1d(file[name])) for name in names)
                count = int(file[f"count{ending}"]) if f"count{ending}" in file.files else None
                found[ending] = Gaussian(mean.double(), covariance.double(), count)
            about = json.loads(str(file["about"])) if "about" in file.files else {}
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"'{path}' cannot be read as an .npz of statistics ({error})") from error
    for ending, g in found.items():
        if g.mean.dim() != 1 or g.covariance.shape != (len(g.mean), len(g.mean)):
            raise EvaluationError(
                f"'{path}': mu{ending} is {tuple(g.mean.shape)}, but sigma{ending} is {tuple(g.covariance.shape)}; "
                "expected (D,) and (D, D)"
            )
        for name, values in ((f"mu{ending}", g.mean), (f"sigma{ending}", g.covariance)):
            if faulty := faulty_rows(values):
                raise EvaluationError(
                    f"'{path}': {count_of(faulty, len(values), f'rows of {name}')}; compute the statistics again"
                )
    return found, about
