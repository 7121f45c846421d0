"""Metrics of generated images and reconstructions: features, their moments, and scores computed from them."""


class EvaluationError(Exception):
    """A metric cannot be computed from these images or files; the message says why and what to do."""
