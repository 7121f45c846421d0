"""Diffusion: probability paths, losses, random numbers and samplers."""
