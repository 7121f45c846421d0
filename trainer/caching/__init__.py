"""Cached latents: making them, and training on them."""
