"""Samples and tokenizers measured: on the command line, and while training."""
