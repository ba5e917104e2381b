"""The parts of the quantisation benchmark, a file each: what is rounded, and how it is measured."""
