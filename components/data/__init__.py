"""Data loading: from datasets to micro-batches on the device."""
