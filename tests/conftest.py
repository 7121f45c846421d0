"""Fixtures for every test."""

import signal

import pytest

from trainer.run.process import CAUGHT


@pytest.fixture(autouse=True)
def signal_handlers_restored():
    """Restore signal handlers: a stopped run keeps ignoring signals, and later child processes would inherit that."""
    before = {s: signal.getsignal(s) for s in CAUGHT}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
