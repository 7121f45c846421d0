"""Files of weights and models, in and out."""
