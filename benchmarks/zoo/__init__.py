"""The parts of `benchmarks/zoo.py`: tiny models of every type, the ground truth, and how both are compared."""
