"""Names and image counts of a dataset's classes, and what differs where two sets of classes meet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from components.contracts import Dataset

SHOWN = 8  # classes that a message lists


class Classes(NamedTuple):
    """The classes of a dataset, in the order of their labels.

    Attributes:
        names: one per class; empty if unknown, as in checkpoints of older versions.
        counts: images per class; empty if unknown.
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset, count: bool = False) -> Classes:
        """The classes of a dataset.

        Args:
            dataset: built.
            count: if the dataset does not know its counts, read every item to count them.
        """
        names, counts = tuple(str(name) for name in dataset.class_names), dataset.class_counts()
        if counts is None and count:
            counts = [0] * len(names)
            for index in range(len(dataset)):
                counts[int(dataset[index].label)] += 1
        return cls(names, tuple(int(n) for n in counts or ()))

    @classmethod
    def from_record(cls, record: Any) -> Classes:
        """Inverse of :meth:`record`; anything else is unknown classes."""
        try:
            return cls(tuple(map(str, record["names"])), tuple(map(int, record["counts"])))
        except (KeyError, TypeError, ValueError):
            return cls()

    @classmethod
    def from_json(cls, text: str) -> Classes:
        """:meth:`from_record` of a JSON text."""
        try:
            return cls.from_record(json.loads(text))
        except ValueError:
            return cls()

    def record(self) -> dict[str, list]:
        """JSON-compatible form, for checkpoints and files."""
        return {"names": list(self.names), "counts": list(self.counts)}

    def difference(self, other: Classes) -> str:
        """What changed from these classes to ``other``: their number, names or order; "" if equal or unknown."""
        old, new = self.names, other.names
        if not old or not new or old == new:
            return ""
        parts = [] if len(old) == len(new) else [f"{counted(len(old))} -> {len(new)}"]
        kept, now = set(old), set(new)
        if gone := [f"'{name}' (index {i})" for i, name in enumerate(old) if name not in now]:
            parts.append(f"missing: {_listed(gone)}")
        if added := [f"'{name}' (index {i})" for i, name in enumerate(new) if name not in kept]:
            parts.append(f"new: {_listed(added)}")
        moved = [f"index {i}: '{a}' -> '{b}'" for i, (a, b) in enumerate(zip(old, new)) if a != b]
        if moved and (not gone or not added or len(old) != len(new)):
            parts.append(_listed(moved, 3))
        return "; ".join(parts)

    def with_images(self, num_classes: int) -> list[int]:
        """Labels in [0, num_classes) of the classes that have images; all of them if the counts are unknown."""
        found = [label for label, count in enumerate(self.counts[:num_classes]) if count]
        return found or list(range(num_classes))

    def notes(self) -> list[str]:
        """What a user should know about these classes, one line each."""
        found = []
        if len(self.names) == 1:
            found.append(
                f"the dataset has 1 class, '{self.names[0]}': every label is 0. If its sub-folders are the classes, "
                "set dataset.path to it"
            )
        if empty := [self.shown(label) for label, count in enumerate(self.counts) if not count]:
            found.append(
                f"{len(empty)} of {counted(len(self.counts))} have no images; they keep their labels, but samples and "
                f"evaluation leave them out: {_listed(empty)}"
            )
        numbers = all(name.isascii() and name.isdecimal() for name in self.names)
        if numbers and list(self.names) != sorted(self.names, key=int):
            i, name = next((i, name) for i, name in enumerate(self.names) if name != str(i))
            found.append(
                f"class names are numbers in the order of text, not of numbers: index {i} is class '{name}' "
                "(sample --labels takes name:N or index:N)"
            )
        return found

    def shown(self, label: int) -> str:
        """A class in messages: index and name."""
        return f"{label} '{self.names[label]}'" if label < len(self.names) else str(label)

    def listing(self, limit: int = 50) -> str:
        """Index and name of the first classes."""
        return _listed([self.shown(label) for label in range(len(self.names))], limit)


def counted(count: int) -> str:
    """Number and noun: 1 class, 2 classes."""
    return f"{count} class" if count == 1 else f"{count} classes"


def _listed(items: Iterable[str], limit: int = SHOWN) -> str:
    found: Sequence[str] = list(items)
    return ", ".join(found[:limit]) + (f", ... ({len(found) - limit} more)" if len(found) > limit else "")
