"""Selections as block lists: what a spec's `selection` clause chooses, from pooled rows and not from all scores.

    select(spec, q, k)   ->   Choice(tiles [B, H, ceil(Q / m), ceil(K / n)], and what single queries see of them)

The meaning of each clause, element by element, is the function of the same name in ir/selections; what is chosen here is equal.
"""
