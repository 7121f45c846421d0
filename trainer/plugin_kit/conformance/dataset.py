"""Checks of datasets."""

from __future__ import annotations

import pickle

import torch

from components.contracts import Dataset, DatasetItem
from components.data.pixels import to_float
from trainer.plugin_kit.conformance.adapter import failing
from trainer.plugin_kit.conformance.case import SIDE, Case, Check, Failure, bind
from trainer.plugin_kit.conformance.contract import sets_every_attribute

EXAMINED = 64  # number of items, spread evenly over the dataset


def checks(case: Case) -> list[Check]:
    case.make()
    return bind(
        case,
        case,
        sets_every_attribute,
        names_its_classes,
        returns_images_at_every_resolution,
        labels_are_in_range,
        items_depend_on_the_index_only,
        returns_its_conditions,
        judges_images,
        raises_index_error_at_the_end,
        can_be_pickled,
    )


def names_its_classes(case: Case) -> None:
    """The dataset is not empty and has a name for each class."""
    data = case.make()
    if len(data.class_names) != data.num_classes:
        raise Failure(f"class_names must contain one name for each of its {data.num_classes} classes")
    if len(data) < 1:
        raise Failure("the dataset is empty: len() is 0")


def returns_images_at_every_resolution(case: Case) -> None:
    """Each item is a DatasetItem with a uint8 image (3, R, R), at every resolution R."""
    for side in (SIDE, 48, 64):
        data = case.make(resolution=side)
        for index in _indices(data)[:4]:
            item = data[index]
            if not isinstance(item, DatasetItem):
                raise Failure(f"item {index} is a {type(item).__name__}; expected components.contracts.DatasetItem")
            found, expected = tuple(item.image.shape), (3, side, side)
            if found != expected:
                raise Failure(f"image {index} has shape {found} at resolution {side}; expected {expected}")
            if item.image.dtype != torch.uint8:
                raise Failure(f"image {index} is {item.image.dtype}; expected torch.uint8, which the trainer scales")


def labels_are_in_range(case: Case) -> None:
    """Every label is an int in [0, num_classes)."""
    data = case.make()
    for index in _indices(data):
        label = data[index].label
        if not isinstance(label, int) or isinstance(label, bool):
            raise Failure(f"the label of item {index} has type {type(label).__name__}; expected int")
        if not 0 <= label < data.num_classes:
            raise Failure(f"the label of item {index} is {label}, outside [0, num_classes = {data.num_classes})")


def items_depend_on_the_index_only(case: Case) -> None:
    """An item depends only on its index, not on earlier reads or on global random generators."""
    data, again = case.make(), case.make(seed=1)
    with torch.random.fork_rng(devices=[]):
        for index in _indices(data)[:8]:
            torch.manual_seed(index)
            first = data[index]
            torch.manual_seed(index + 1)
            if not _same(first, data[index]) or not _same(first, again[index]):
                raise Failure(
                    f"item {index} differs between two reads; draw its random numbers from "
                    "torch.Generator().manual_seed(index), so that a resumed run sees the same images"
                )


def returns_its_conditions(case: Case) -> None:
    """Items and samples have the entries of Condition.more that ``conditions`` names, with equal shapes."""
    data, ids = case.make(), [0, 3]
    item, sampled = data[0].condition, data.sampling_conditions(ids)
    for place, found in (("an item's condition", item), ("sampling_conditions()", sampled)):
        if set(found) != set(data.conditions):
            raise Failure(f"conditions = {data.conditions}, but {place} has {sorted(found)}")
    for name, value in item.items():
        expected = (len(ids), *value.shape)
        if sampled[name].shape != expected or sampled[name].dtype != value.dtype:
            raise Failure(
                f"sampling_conditions({ids}) returns {name} with shape {tuple(sampled[name].shape)} and "
                f"{sampled[name].dtype}; expected {expected} and {value.dtype}, as of the items"
            )


def judges_images(case: Case) -> None:
    """A dataset with a judge returns a class and, with ``judge_dim``, features for each image."""
    data, count = case.make(), 3
    images = to_float(torch.stack([data[index].image for index in (_indices(data) * count)[:count]]))
    if data.has_judge:
        labels = data.judge(images)
        if labels.shape != (count,) or labels.is_floating_point():
            raise Failure(f"judge() returns {labels.dtype} {tuple(labels.shape)}; expected int64 ({count},)")
        if not 0 <= labels.min() <= labels.max() < data.num_classes:
            raise Failure(f"judge() returns labels outside [0, num_classes = {data.num_classes})")
    if data.judge_dim:
        features, expected = data.judge_features(images), (count, data.judge_dim)
        if features.shape != expected or not torch.isfinite(features).all():
            raise Failure(f"judge_features() returns {tuple(features.shape)}; expected {expected}, finite")
        if not data.judge_identity():
            raise Failure("judge_identity() is empty; return a fingerprint of the judge's weights")


def raises_index_error_at_the_end(case: Case) -> None:
    """Indexing with the dataset's length raises IndexError."""
    data = case.make()
    try:
        data[len(data)]
    except IndexError:
        return
    raise Failure(f"item {len(data)} of {len(data)} does not raise IndexError")


def can_be_pickled(case: Case) -> None:
    """The dataset can be pickled for data-loading workers and then returns the same items."""
    data = case.make()
    with failing("cannot be pickled, as data-loading workers require; open files when reading items, not before"):
        copy = pickle.loads(pickle.dumps(data))
    if len(copy) != len(data) or not all(_same(copy[i], data[i]) for i in _indices(data)[:4]):
        raise Failure("returns different items after pickling")


def _indices(data: Dataset) -> list[int]:
    count = min(EXAMINED, len(data))
    return sorted({round(i * (len(data) - 1) / max(count - 1, 1)) for i in range(count)})


def _same(a: DatasetItem, b: DatasetItem) -> bool:
    same = [torch.equal(value, b.condition[name]) for name, value in a.condition.items()]
    return torch.equal(a.image, b.image) and a.label == b.label and all(same)
