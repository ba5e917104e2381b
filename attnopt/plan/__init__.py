"""Choice: kernels by measurement, approximations under a budget, verification and roll-back."""
