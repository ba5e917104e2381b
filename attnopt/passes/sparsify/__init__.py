"""Rewrites that let a query see fewer keys."""
