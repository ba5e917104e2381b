"""Rewrites that leave something out: whole sublayers, heads."""
