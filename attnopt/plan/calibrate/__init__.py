"""Measuring this machine: the points, their kernels, and the target file."""
