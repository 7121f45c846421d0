"""Loading trained models, importing weights, and sample folders."""
