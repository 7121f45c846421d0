"""Checks of tensors where they leave the program: what holds NaN or infinity is refused, with a count and a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NotFiniteError(Exception):
    """Values are not finite; the message says how many, where, and what to do."""


def sound_rows(x: Tensor) -> Tensor:
    """Which rows of ``x`` (B, ...) are finite, as bool (B,)."""
    return torch.isfinite(x).flatten(1).all(1) if x.dim() > 1 else torch.isfinite(x)


def faulty_rows(x: Tensor, first: int = 0) -> list[int]:
    """Numbers of the rows of ``x`` (B, ...) that are not finite, counted from ``first``. Waits for the device."""
    return (first + (~sound_rows(x)).nonzero().flatten()).tolist()


def count_of(faulty: Sequence[int], total: int, what: str) -> str:
    """Text such as "3 of 64 samples are not finite (first: number 17)"."""
    return f"{len(faulty)} of {total} {what} are not finite (first: number {min(faulty)})"


def check_weights(states: Mapping[str, Mapping[str, Tensor]], remedy: str) -> None:
    """Check the state dicts of a model's parts.

    Args:
        states: state dicts by part.
        remedy: what to do, for the message.

    Raises:
        NotFiniteError: names the first tensor of each part that is not finite.
    """
    found = []
    for part, state in states.items():
        faulty = [key for key, value in state.items() if not torch.isfinite(value).all()]
        if faulty:
            count = int((~torch.isfinite(state[faulty[0]])).sum())
            found.append(
                f"{len(faulty)} of {len(state)} tensors of the {part} are not finite (first: {faulty[0]}, {count} of "
                f"{state[faulty[0]].numel()} values)"
            )
    if found:
        raise NotFiniteError(f"{'; '.join(found)}; {remedy}")
