"""Rewrites that compute in fewer dimensions."""
