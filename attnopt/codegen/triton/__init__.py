"""Kernels for GPUs: Triton source emitted for one spec, compiled without the GPU, run as an operator of torch."""
