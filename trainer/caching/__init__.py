"""Latent caches: encoding a dataset, and training on the result."""
