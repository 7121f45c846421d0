"""Estimates of a run's memory, communication and FLOPs, without running it."""
