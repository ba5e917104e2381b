"""What a model does on real inputs: statistics of its linear layers and attentions, gathered over calibration batches."""
