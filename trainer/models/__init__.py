"""Trained models in and out."""
