"""Conformance checks of a plugin as pytest tests, for use in another project's test suite.

    pytest -p plugins.conformance.pytest_options --pyargs plugins.conformance --plugin my_lab.encoders:my_encoder

The checks are in :mod:`components.conformance`; ``python -m trainer conform`` runs them without pytest. Nothing here
imports pytest or registers a plugin, because plugin discovery imports this package.
"""
