"""Kernels for CPUs: TVMScript emitted for one spec, compiled by LLVM for the machine at hand."""
