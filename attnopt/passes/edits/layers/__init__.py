"""Linear layers and whole sublayers: found, measured, given other weights, taken out."""
