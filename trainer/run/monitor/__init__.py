"""Speed, FLOPs, profiles and TensorBoard output of a run."""
