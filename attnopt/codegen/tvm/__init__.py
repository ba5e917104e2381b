"""Kernels for CPUs: a spec as TVMScript, compiled by TVM for the machine at hand or for one that is named."""
