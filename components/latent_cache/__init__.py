"""Latent cache: tokenizer posteriors and encoder features, computed once and read in every epoch."""
