"""Templates of kernels in TVMScript: read as text and filled in for one spec, never imported."""
