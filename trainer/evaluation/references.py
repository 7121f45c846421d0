"""Sets of images on the command line: samples, and what they are compared with."""

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
from trainer.run.assemble import make_plugin


@dataclass
class Reference:
    """What samples are compared with.

    Attributes:
        name: as the user named it.
        images: none where there are only statistics.
        statistics: moments by ending, measured elsewhere; they are preferred.
        about: which networks the statistics are of, by label; none: unknown (ADM's files).
    """

    name: str
    images: Images | None = None
    statistics: dict[str, Gaussian] = field(default_factory=dict)
    about: dict[str, Any] | None = None

    def moments(self, m: Measured, feature: str) -> Gaussian | None:
        """The kept statistics of a network's feature, if there are any; ConfigError if they are another network's."""
        found = self.statistics.get(m.ending(feature))
        if found is not None and self.about is not None:
            theirs = {key: value for key, value in self.about.get(m.label, {}).items() if key != "file"}
            if theirs != m.identity:
                raise ConfigError(
                    f"the statistics of '{self.name}' were measured by another network:\n  there {theirs}\n"
                    f"  here  {m.identity}\nUse the same, or measure them again"
                )
        return found

    def warnings(self, networks: Sequence[Measured]) -> list[str]:
        """Where nobody knows which network the statistics are of."""
        doubtful = self.about is None and any(e in self.statistics for e in ENDINGS.values())
        if doubtful and any(m.network.about.get("published") is False for m in networks):
            return [f"'{self.name}' does not say which network its statistics are of; ADM's are of the published one"]
        return []


def open_samples(path: str) -> tuple[Images, dict[str, Any]]:
    """A folder of images or an ``.npz``, and what its ``samples.json`` says of it.

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
            f"'{path}' is a run; "
            + (f"name one of its folders of samples:{listed}" if listed else "sample from it first")
            + f"\n(python -m trainer sample {path}; for its tokenizer: --reconstruction)"
        )
    images = ImageFolder(there)
    wanted = settings.get("num_samples", 0)
    if len(images) < wanted:
        raise EvaluationError(
            f"'{path}' holds {len(images)} of {wanted} images: sampling was interrupted; run the same sample command "
            "again, which goes on"
        )
    return images, settings


def open_reference(path: str, config: Config | None, count: int) -> Reference:
    """An image folder, "dataset", an ADM reference batch or a statistics file.

    Args:
        path: as the user named it.
        config: whose dataset "dataset" is.
        count: at most so many of its images; 0: all.

    Raises:
        EvaluationError: there is nothing to compare with, saying what is allowed.
        ConfigError: "dataset" without a config.
    """
    if path == "dataset":
        if config is None:
            raise ConfigError("--reference=dataset: which one? The samples name no run; give --config=TOML_OR_RUN")
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
    """The images of a config's dataset.

    Args:
        config: names the dataset.
        dataset: it, where it is there already: as in training, what stands for an unreadable file counts.
    """
    strict = dataset is None
    if dataset is None:
        dataset = make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    identity = f"{config.dataset.model_dump()} {config.training.resolution}"
    return DatasetImages(dataset, f"dataset {config.dataset.name}", identity, strict)
