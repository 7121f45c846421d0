"""Checks of datasets."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from components.contracts import DatasetItem
from trainer.plugin_kit.conformance.form import attribute, named
from trainer.plugin_kit.conformance.subject import Fault, Subject

SIDE = 32
LOOKED_AT = 64  # number of items, spread evenly over the dataset


def checks(subject: Subject) -> list:
    subject.make(SIDE)
    return [
        has_its_attributes,
        gives_images_at_every_resolution,
        labels_lie_in_range,
        is_a_function_of_the_index,
        ends,
        travels_to_workers,
    ]


def has_its_attributes(subject: Subject) -> None:
    """The dataset has num_classes, class_names, flip and a length."""
    data = subject.make(SIDE)
    classes = attribute(data, "num_classes", int, "labels are in [0, num_classes)")
    if not hasattr(data, "class_names") or len(data.class_names) != classes:
        raise Fault(f"class_names must contain one name for each of its {classes} classes")
    attribute(data, "flip", bool, "whether training may flip the images horizontally")
    if len(data) < 1:
        raise Fault("the dataset is empty: len() is 0")


def gives_images_at_every_resolution(subject: Subject) -> None:
    """Each item is a DatasetItem with a uint8 image (3, R, R), at every resolution R."""
    for side in (SIDE, 48, 64):
        data = subject.make(side)
        for index in _indices(data)[:4]:
            item = data[index]
            if not isinstance(item, DatasetItem):
                raise Fault(f"item {index} is a {type(item).__name__}; expected components.contracts.DatasetItem")
            if tuple(item.image.shape) != (3, side, side):
                found = tuple(item.image.shape)
                raise Fault(f"image {index} has shape {found} at resolution {side}; expected {(3, side, side)}")
            if item.image.dtype != torch.uint8:
                raise Fault(f"image {index} is {item.image.dtype}; expected torch.uint8, which the trainer scales")


def labels_lie_in_range(subject: Subject) -> None:
    """Every label is an int in [0, num_classes)."""
    data = subject.make(SIDE)
    for index in _indices(data):
        label = data[index].label
        if not isinstance(label, int) or isinstance(label, bool):
            raise Fault(f"the label of item {index} has type {type(label).__name__}; expected int")
        if not 0 <= label < data.num_classes:
            raise Fault(f"the label of item {index} is {label}, outside [0, num_classes = {data.num_classes})")


def is_a_function_of_the_index(subject: Subject) -> None:
    """An item depends only on its index, not on earlier reads or on global random generators."""
    data, again = subject.make(SIDE), subject.make(SIDE, seed=1)
    with torch.random.fork_rng(devices=[]):
        for index in _indices(data)[:8]:
            torch.manual_seed(index)
            first = data[index]
            torch.manual_seed(index + 1)
            if not _same(first, data[index]) or not _same(first, again[index]):
                raise Fault(
                    f"item {index} differs between two reads; draw its random numbers from "
                    "torch.Generator().manual_seed(index), so that a resumed run sees the same images"
                )


def ends(subject: Subject) -> None:
    """Indexing with the dataset's length raises IndexError."""
    data = subject.make(SIDE)
    try:
        data[len(data)]
    except IndexError:
        return
    raise Fault(f"item {len(data)} of {len(data)} does not raise IndexError")


def travels_to_workers(subject: Subject) -> None:
    """The dataset can be pickled for data-loading workers and then returns the same items."""
    data = subject.make(SIDE)
    with named("cannot be pickled, as data-loading workers require; open files when reading items, not before"):
        copy = pickle.loads(pickle.dumps(data))
    if len(copy) != len(data) or not all(_same(copy[i], data[i]) for i in _indices(data)[:4]):
        raise Fault("returns different items after pickling")


def _indices(data: Any) -> list[int]:
    count = min(LOOKED_AT, len(data))
    return sorted({round(i * (len(data) - 1) / max(count - 1, 1)) for i in range(count)})


def _same(a: DatasetItem, b: DatasetItem) -> bool:
    return torch.equal(a.image, b.image) and a.label == b.label
