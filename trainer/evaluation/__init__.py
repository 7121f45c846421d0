"""Evaluation of samples and tokenizers, on the command line and during training."""
