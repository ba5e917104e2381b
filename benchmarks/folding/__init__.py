"""Models whose weights are folded: shapes that published models of the other benchmarks do not have."""
