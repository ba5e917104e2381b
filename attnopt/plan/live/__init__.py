"""From a plan on the traced graph of a transformers model to the live model."""
