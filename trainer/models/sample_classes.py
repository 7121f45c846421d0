"""Classes of a model that is sampled from: their names and frequencies, and whether a guide means the same ones."""

from __future__ import annotations

from components.data.classes import Classes
from components.data.loader import DataError
from trainer.config import ConfigError
from trainer.models.source import LoadedModel
from trainer.run.construct import make_plugin
from trainer.run.parts import Parts


def check_guide(source: LoadedModel, guide: LoadedModel) -> None:
    """Raise ConfigError if the labels of two models mean different classes."""
    changed = source.classes.difference(guide.classes)
    ours, theirs = source.parts.num_classes, guide.parts.num_classes
    if not changed and ours != theirs:
        changed = f"{ours} classes -> {theirs}"
    if changed:
        raise ConfigError(
            f"--guide={guide.path}: its classes differ from those of {source.path} (source -> guide): {changed}; "
            "choose a guide trained on the same classes"
        )


def classes_for(labels: str, source: LoadedModel) -> Classes:
    """Classes of a model, as far as ``labels`` needs them: from its checkpoint, else from the dataset of its config.

    Raises:
        ConfigError: they are needed and neither is available, or the dataset's differ from the checkpoint's.
    """
    classes, words = source.classes, labels.split(",")
    by_name = labels not in ("balanced", "random", "dataset") and not all(w.strip().isdecimal() for w in words)
    if (labels != "dataset" or classes.counts) and (not by_name or classes.names):
        return classes
    config = source.config
    try:
        dataset = source.parts.dataset or make_plugin("dataset", "dataset", config.dataset, config.training.resolution)
    except (DataError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"--labels={labels}: '{source.path}' does not record its classes, and its dataset is not available "
            f"({reason}); name the dataset (--dataset.KEY=VALUE), or use class indices"
        ) from error
    found = Classes.of(dataset, count=labels == "dataset")
    if changed := classes.difference(found):
        raise ConfigError(
            f"--labels={labels}: the dataset's classes differ from those of '{source.path}' (source -> dataset): "
            f"{changed}; name the dataset that it was trained on (--dataset.KEY=VALUE)"
        )
    return found


def left_out_of(kind: list[int] | str, parts: Parts) -> list[int]:
    """Classes without images, where ``kind`` takes all others in turn or at random."""
    if kind not in ("balanced", "random"):
        return []
    return sorted(set(range(parts.num_classes)) - set(parts.classes.with_images(parts.num_classes)))
