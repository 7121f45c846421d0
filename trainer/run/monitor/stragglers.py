"""Detection of stragglers: ranks that all others wait for."""

from __future__ import annotations

import logging
import time

import torch

logger = logging.getLogger("titanrepa")

SLOW = 1.5  # warn of a rank that takes this many times as long as the median rank
WAITING = 0.1  # warn of a rank that spends this fraction of its time waiting for data


class Stragglers:
    """Warns of the rank that waits longest for data, and of a rank that computes much slower than the others."""

    def __init__(self) -> None:
        self._slow: int | None = None

    def __call__(self, step: int, ranks: list[list[float]]) -> dict[str, float]:
        """Compare all ranks.

        Args:
            step: for the messages.
            ranks: for each rank, the fraction of its time spent waiting for data, and the seconds of :func:`probe`.

        Returns:
            Scalars for TensorBoard; empty on a single rank.
        """
        if len(ranks) < 2:
            return {}
        waits, probes = zip(*ranks)
        slowest = max(range(len(ranks)), key=lambda rank: waits[rank])
        if waits[slowest] > WAITING:
            logger.warning(
                f"step {step}: rank {slowest} spends {waits[slowest]:.0%} of its time waiting for data (median rank: "
                f"{sorted(waits)[len(waits) // 2]:.0%}), and all others wait for it; increase loader.workers or use a "
                "faster disk"
            )
        slowest = max(range(len(ranks)), key=lambda rank: probes[rank])
        usual = sorted(probes)[(len(probes) - 1) // 2]
        named, self._slow = self._slow, slowest if probes[slowest] > SLOW * usual else None
        if self._slow is not None and named == slowest:  # a single time may be chance
            logger.warning(
                f"step {step}: rank {slowest} takes {probes[slowest] / usual:.1f} times as long to compute as the "
                "median rank, and all others wait for it; check its device's clock, temperature and other processes"
            )
        return {"speed/slowest_rank_ratio": probes[slowest] / usual}


def probe(device: torch.device) -> float:
    """Seconds of a fixed computation on this rank's device, the best of three. Cost: a few milliseconds."""
    size, count = (4096, 8) if device.type == "cuda" else (256, 8)
    x = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):  # the best of three, to ignore hiccups
        start = time.perf_counter()
        for _ in range(count):
            x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
