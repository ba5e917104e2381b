"""Exact algebra on weights: fewer nodes, fewer products, the same outputs."""
