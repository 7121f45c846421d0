"""Benchmarks of the training step. See docs/performance.md."""
