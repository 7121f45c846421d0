"""Opens the image sets named on the command line: samples, and the reference to compare them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluation import EvaluationError
from components.evaluation.images import ArrayImages, DatasetImages, First, ImageFolder, Images
from components.evaluation.measures import ENDINGS
from components.evaluation.moments import Gaussian, read_statistics
from trainer.config import Config, ConfigError
from trainer.evaluation.measured import Measured
from trainer.models.sample_folder import SETTINGS, SampleFolder
from trainer.run.construct import make_plugin


@dataclass
class Reference:
    """Reference that samples are compared with.

    Attributes:
        name: as the user wrote it.
        images: reference images, or None if there are only statistics.
        statistics: precomputed moments by key suffix; they take precedence over images.
        about: networks that the statistics were computed with, by label; None: unknown (ADM's files).
    """

    name: str
    images: Images | None = None
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    about: dict[str, Any] | None = None

    def moments(self, m: Measured, feature: str) -> Gaussian | None:
        """Precomputed moments of a network's feature, or None.

        Raises:
            ConfigError: the statistics were computed with another network.
        """
        found = self.statistics.get(m.ending(feature))
        if found is not None and self.about is not None:
            theirs = {key: value for key, value in self.about.get(m.label, {}).items() if key != "file"}
            if theirs != m.identity:
                raise ConfigError(
                    f"the statistics of '{self.name}' were computed with another network:\n  file: {theirs}\n"
                    f"  here: {m.identity}\nUse the same network, or compute the statistics again"
                )
        return found

    def warnings(self, networks: Sequence[Measured]) -> list[str]:
        """Warn if it is unknown which network the statistics belong to, and ours is not the published one."""
        doubtful = self.about is None and any(e in self.statistics for e in ENDINGS.values())
        if doubtful and any(m.network.about.get("published") is False for m in networks):
            return [f"'{self.name}' does not state the network of its statistics; ADM's belong to the published one"]
        return []


def open_samples(path: str) -> tuple[Images, dict[str, Any]]:
    """Open a folder of images or an ``.npz``; return the images and the contents of its ``samples.json``, if any.

    Raises:
        EvaluationError: there are no images, or sampling was interrupted.
    """
    there = Path(path).expanduser()
    if there.suffix == ".npz" and there.is_file():
        return ArrayImages(there), SampleFolder(there.parent).settings() or {}
    if not there.is_dir():
        what = "does not exist" if not there.exists() else "is neither a folder nor an .npz"
        raise EvaluationError(f"'{path}' {what}; expected a folder of PNG or JPEG images, or an .npz with arr_0")
    settings = SampleFolder(there).settings() or {}
    if not settings and (there / "checkpoints").is_dir():
        listed = "".join(f"\n  {p.parent}" for p in sorted(there.glob(f"samples/*/{SETTINGS}")))
        raise EvaluationError(
            f"'{path}' is a run folder; "
            + (f"name one of its sample folders:{listed}" if listed else "sample from it first")
            + f"\n(python -m trainer sample {path}; to evaluate its tokenizer: --reconstruction)"
        )
    images = ImageFolder(there)
    wanted = settings.get("num_samples", 0)
    if len(images) < wanted:
        raise EvaluationError(
            f"'{path}' holds {len(images)} of {wanted} images: sampling was interrupted; repeat the sample command to "
            "resume"
        )
    return images, settings


def open_reference(path: str, config: Config | None, count: int) -> Reference:
    """Open the reference: an image folder, the word "dataset", an ADM reference batch or a statistics file.

    Args:
        path: as the user wrote it.
        config: defines the dataset, for "dataset".
        count: use at most this many images; 0: all.

    Raises:
        EvaluationError: the path holds no reference; states what is allowed.
        ConfigError: "dataset" without a config.
    """
    if path == "dataset":
        if config is None:
            raise ConfigError("--reference=dataset: the samples name no run; add --config=TOML_OR_RUN")
        images: Images = dataset_images(config)
        return Reference(path, First(images, count) if count else images)
    there = Path(path).expanduser()
    if there.suffix == ".npz" and there.is_file():
        statistics, about = read_statistics(there)
        with np.load(there, allow_pickle=False) as file:
            has_images = "arr_0" in file.files
        if not has_images and not statistics:
            raise EvaluationError(f"'{path}' holds neither images (arr_0) nor statistics (mu, sigma)")
        images = ArrayImages(there) if has_images else None
        return Reference(path, First(images, count) if images and count else images, statistics, about)
    if not there.is_dir():
        raise EvaluationError(
            f"--reference={path} does not exist; expected a folder of images, an .npz with arr_0 or with mu and "
            "sigma, or the word dataset"
        )
    images = ImageFolder(there)
    return Reference(path, First(images, count) if count else images)


def dataset_images(config: Config, dataset: Any = None) -> DatasetImages:
    """Images of a config's dataset.

    Args:
        config: names the dataset.
        dataset: the dataset, if it is built already. Unreadable images are then replaced by others, as in training;
            otherwise they are errors.
    """
    strict = dataset is None
    if dataset is None:
        dataset = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    identity = f"{config.dataset.model_dump()} {config.training.resolution}"
    return DatasetImages(dataset, f"dataset {config.dataset.name}", identity, strict)
