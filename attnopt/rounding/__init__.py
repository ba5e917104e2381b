"""Numbers in few bits: formats, codes packed to bytes, grids of levels, and ways to round a matrix of weights to them."""
