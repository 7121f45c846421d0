"""Paths, losses, random numbers and samplers of diffusion."""
