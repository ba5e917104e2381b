"""Rewrites that share heads between queries, or leave heads out."""
