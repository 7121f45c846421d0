"""States for the checkpoint tests."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch

from components.checkpoint import CheckpointManager


def state_at(step: int) -> dict:
    """Return a state in which every value equals the step."""
    return {"model": {"w": torch.full((64, 8), float(step)), "n": torch.tensor(step)}, "step": step}


def blank() -> dict:
    return {"model": {"w": torch.zeros(64, 8), "n": torch.tensor(0)}, "step": None}


def assert_holds(manager: CheckpointManager, path: Path, step: int) -> None:
    state = manager.load(path, blank())
    assert state["step"] == step
    assert state["model"]["n"].item() == step
    assert (state["model"]["w"] == step).all()


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def two_checkpoints(folder: Path) -> Path:
    manager = CheckpointManager(folder)
    manager.save(1, state_at(1))
    return manager.save(2, state_at(2))


@contextlib.contextmanager
def full_disk():
    """Simulate a full disk by a limit on file size: writing fails partway in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
