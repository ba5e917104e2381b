"""Exact rewrites that compute the same with fewer, larger kernels."""
