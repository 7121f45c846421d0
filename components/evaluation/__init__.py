"""Measures of generated images and of reconstructions: features, their moments, and scores out of them."""


class EvaluationError(Exception):
    """A measure cannot be had from these images or files; the message says why, and what to do."""
