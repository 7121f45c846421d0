"""Fixtures for every test, and the option --fast."""

import contextlib
import signal

import pytest

from components import registry
from trainer.signals import CAUGHT

# Inductor imports setuptools, which must come before distutils; some other library may import that first.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out the tests marked long")


def pytest_configure(config):
    if config.getoption("--fast", default=False) and config.option.durations is None:
        # Names the tests that should be marked long.
        config.option.durations, config.option.durations_min = 5, 5.0


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast", default=False):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]
    # Files with long tests first: workers take whole files in this order, and the last ones should be short.
    first = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in first)


def pytest_sessionstart(session):
    """Let child processes get signals as from a terminal: nohup and a shell's & start the tests with some ignored."""
    for s in CAUGHT:
        if signal.getsignal(s) is signal.SIG_IGN:
            signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def plugins_imported():
    """Import all plugins: one imported while a test replaces the registry would be missing in the tests after it."""
    registry.discover("plugins")


@pytest.fixture(scope="session", autouse=True)
def trusted_plugins_apart(tmp_path_factory):
    """Keep the plugin files that tests trust apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@contextlib.contextmanager
def _own_registry():
    registry.discover("plugins")
    with pytest.MonkeyPatch.context() as patch:
        for kind in registry.KINDS.values():
            patch.setattr(kind, "_plugins", dict(kind._plugins))
        yield


@pytest.fixture
def own_registry():
    """Unregister the test's own plugins afterwards."""
    with _own_registry():
        yield


@pytest.fixture(scope="module")
def module_registry():
    """Unregister the module's own plugins after its tests."""
    with _own_registry():
        yield


@pytest.fixture(autouse=True)
def signal_handlers_restored():
    """Restore signal handlers: a stopped run keeps ignoring signals, and later child processes would inherit that."""
    before = {s: signal.getsignal(s) for s in CAUGHT}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
