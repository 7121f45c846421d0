"""Latents and features computed once and read every epoch."""
