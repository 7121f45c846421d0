"""Metrics of training, and the guard that detects failing runs."""
