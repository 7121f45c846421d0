"""The contract of a plugin's kind as pytest tests: for a test suite of your own.

    pytest -p plugins.conformance.pytest_options --pyargs plugins.conformance --plugin my_lab.encoders:my_encoder

What is checked is in :mod:`components.conformance`, which ``python -m trainer conform`` runs without pytest. Nothing
here imports pytest or registers a plugin, so that looking for plugins may import it.
"""
