"""The parts of benchmarks/sparsify.py."""
