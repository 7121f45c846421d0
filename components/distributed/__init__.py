"""Distributed training: sharding, collectives and activation checkpointing."""
