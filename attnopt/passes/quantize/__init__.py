"""Rewrites that store or compute in fewer bits."""
