"""Orthogonal matrices that spread large values over many: Hadamard matrices with random signs, of a whole width or in blocks.

    H H' = 1, entries ± n^-1/2        rotation(192, seed)  =  diag(signs) H         blocks(x, 128)  =  x with each 128 channels times H

Orders: powers of two, times 1, 12 or 20 (Paley's first construction for the primes 11 and 19). Other widths get a random orthogonal
matrix, which spreads as well and only cannot be applied by additions.
Sources: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", "RSQ", "QuEST"; Paley, "On orthogonal matrices" (1933).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PALEY = (12, 20)
BLOCK = 128  # channels that are mixed where a transform is computed at run time
LEAST_BLOCK = 16


@lru_cache(maxsize=16)
def hadamard(order: int) -> Tensor | None:
    """The normalised Hadamard matrix [order, order] in float64; None for orders that none is known of here."""
    odd = order & -order
    core = order // odd
    start = {1: 1, 3: 12, 5: 20}.get(core)
    if start is None or order % start:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64) if start == 1 else paley(start)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / order**0.5


def paley(order: int) -> Tensor:
    """1 + S of a prime q = order - 1 that is 3 modulo 4, S skew: its inner part holds which differences are squares modulo q."""
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    signs = torch.tensor([0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(q)], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.zeros(order, order, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    matrix[1:, 1:] = signs[(index[None] - index[:, None]) % q]
    return matrix + torch.eye(order, dtype=torch.float64)


def rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [width, width] in float64: Hadamard with random signs where there is one of this order."""
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(width)
    if matrix is not None:
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        return signs[:, None] * matrix
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * torch.sign(r.diagonal())


def block_width(width: int, most: int = BLOCK) -> int | None:
    """The largest power of two up to `most` that divides a width; None where it is too small to spread anything."""
    block = min(width & -width, most)
    return block if block >= LEAST_BLOCK else None


def in_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., n] with every `block` neighbouring channels times H, in x's own dtype; its own inverse, as H is symmetric."""
    matrix = hadamard(block)
    assert matrix is not None
    return (x.unflatten(-1, (-1, block)) @ matrix.to(x.dtype)).flatten(-2)


def is_hadamard(matrix: Tensor) -> bool:
    """Whether a matrix is the normalised one of its order, in its own dtype: it mixes, and is no layer's weight."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not LEAST_BLOCK <= len(matrix) <= BLOCK:
        return False
    known = hadamard(len(matrix))
    return known is not None and torch.equal(known.to(matrix.dtype), matrix.cpu())
