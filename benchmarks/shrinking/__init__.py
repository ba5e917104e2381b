"""The parts of benchmarks/shrink.py."""
