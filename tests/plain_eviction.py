"""The cache policies again, written plainly from their papers: one sequence, loops over heads and tokens, no padding, float64.

Each returns a score for every token and key head [G, L]; `kept` takes the best. Benchmarks use them as a peer, tests as a second opinion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept(scores: Tensor, count: int, first: int = 0, newest: int = 0) -> list[list[int]]:
    """Of each key head the `count` tokens of highest score in their order; the first and the newest before all others."""
    found = []
    for row in scores.tolist():
        length = len(row)
        protected = [j for j in range(length) if j < first or j >= length - newest]
        others = sorted((j for j in range(length) if j not in protected), key=lambda j: (-row[j], j))
        found.append(sorted(protected + others[: max(0, count - len(protected))]))
    return found


def key_norm(k: Tensor) -> Tensor:
    return torch.stack([torch.stack([-token.norm() for token in head]) for head in k.double()])


def q_filter(k: Tensor, filters: Tensor) -> Tensor:
    return torch.stack([torch.stack([token @ f for token in head]) for head, f in zip(k.double(), filters.double(), strict=True)])


def main_direction(q: Tensor) -> tuple[Tensor, float]:
    """The unit vector along which queries [n, D] have most of their energy, most of them on its positive side; and its share."""
    square = q.double().T @ q.double()
    values, vectors = torch.linalg.eigh(square)
    v = vectors[:, -1]
    if (q.double() @ v > 0).double().mean() < 0.5:
        v = -v
    return v, float(values[-1] / values.sum())


def snap(q: Tensor, k: Tensor, scale: float, window: int, kernel: int, pooling: str = "mean") -> Tensor:
    """q [H, L, D], k [G, L, D]. Tokens of the window have no score."""
    heads, length, groups = q.shape[0], q.shape[1], k.shape[0]
    before = length - window
    found = torch.zeros(groups, length, dtype=torch.float64)
    for h in range(heads):
        g = h * groups // heads
        total = torch.zeros(before, dtype=torch.float64)
        for t in range(before, length):
            logits = torch.stack([scale * (q[h, t].double() @ k[g, j].double()) for j in range(t + 1)])
            total += torch.softmax(logits, 0)[:before]
        for j in range(before):
            near = [float(total[i]) if 0 <= i < before else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
            found[g, j] += (sum(near) / kernel if pooling == "mean" else max(near)) * groups / heads
    return found


def expected(plain: Tensor, k: Tensor, v: Tensor, turns: list[Tensor], scale: float, sinks: int, eps: float = 0.0) -> Tensor:
    """plain [H, L, D]: queries before they are turned. turns: a matrix [D, D] for each position to come. Sinks have no score."""
    heads, groups, length = plain.shape[0], k.shape[0], k.shape[1]
    turn = sum(t.double() for t in turns) / len(turns)
    found = torch.zeros(groups, length, dtype=torch.float64)
    for h in range(heads):
        g, q = h * groups // heads, plain[h, sinks:].double()
        mean = q.mean(0)
        covariance = sum(torch.outer(x - mean, x - mean) for x in q) / len(q)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        z = torch.stack([scale * (mean @ key) + scale**2 / 2 * (key @ covariance @ key) for key in k[g, sinks:].double()])
        found[g, sinks:] += torch.softmax(z, 0) * groups / heads
    for g in range(groups):
        for j in range(sinks, length):
            found[g, j] = (found[g, j] + eps) * v[g, j].double().norm()
    return found


def rotation(position: int, width: int, base: float = 10000.0) -> Tensor:
    """The turn of a position [D, D]: channel c with channel c + D / 2."""
    half, turn = width // 2, torch.zeros(width, width, dtype=torch.float64)
    for c in range(half):
        angle = position * base ** (-2.0 * c / width)
        turn[c, c] = turn[c + half, c + half] = math.cos(angle)
        turn[c, c + half], turn[c + half, c] = -math.sin(angle), math.sin(angle)
    return turn
