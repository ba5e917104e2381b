"""Attention on a GPU: what is measured (case, order), against whom (peers, sdpa, flex), how (clock, check), and what is told (table)."""
