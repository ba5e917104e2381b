"""Other heads in a block: maps between heads, the block written anew, what its output projection makes up for."""
