"""Templates of TVM kernels: read as text, filled in and only then run."""
