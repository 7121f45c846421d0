"""One test per check of the plugin named with ``--plugin``."""

from __future__ import annotations

from typing import Any

from trainer.plugin_kit.conformance import checks, resolve


def pytest_generate_tests(metafunc: Any) -> None:
    config = metafunc.config
    if not (spec := config.getoption("--plugin", default=None)):
        raise SystemExit(
            "no plugin named; use pytest -p trainer.plugin_kit.conformance.pytest_options "
            "--pyargs trainer.plugin_kit.conformance --plugin my_lab.encoders:my_encoder"
        )
    found = checks(resolve("plugins", spec, config.getoption("--option"), config.getoption("--parts")))
    metafunc.parametrize("check", list(found.values()), ids=list(found))


def test_plugin(check: Any) -> None:
    check.run()
