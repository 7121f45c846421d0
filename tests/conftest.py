"""What every test gets."""

import signal

import pytest

from trainer.run.process import CAUGHT


@pytest.fixture(autouse=True)
def signal_handlers_restored():
    """A run that was stopped goes on ignoring signals, and processes that a later test starts would inherit that."""
    before = {s: signal.getsignal(s) for s in CAUGHT}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
