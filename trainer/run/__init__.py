"""A training run, from assembly to the last step."""
