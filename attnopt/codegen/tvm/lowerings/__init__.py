"""TVM kernels in the graphs of models: each family that a torch model can call on a CPU."""
