"""Linear maps between the heads of a block: what every change of its width or its number of heads comes down to.

    new head g  =  sum over n of  matrices[g, n] @ old head sources[g, n]

    HeadMap.identity(8, 64)                      every head as it is
    sources [[0, 1], [2, 3]], matrices I / 2     mean pooling of neighbours
    sources [[0], [1], …], matrices U'           a basis of r channels for each head

Applied to the rows of a projection [H, D, in], to its bias [H, D], and to past rows of a cache [B, H, P, D] alike, because all are linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadMap:
    """sources [G, N] int64; matrices [G, N, new width, old width], float64. A group of fewer than N heads has matrices of zeros."""

    sources: Tensor
    matrices: Tensor

    @classmethod
    def identity(cls, heads: int, width: int) -> HeadMap:
        return cls.of_bases(torch.eye(width, dtype=torch.float64).expand(heads, width, width))

    @classmethod
    def of_bases(cls, bases: Tensor) -> HeadMap:
        """Each head in a basis of its own, bases [H, width, rank] with orthonormal columns: x -> x U."""
        return cls(torch.arange(len(bases))[:, None], bases.double().mT[:, None].contiguous())

    @classmethod
    def kept(cls, heads: Sequence[int], width: int) -> HeadMap:
        """Some heads as they are, in this order."""
        eye = torch.eye(width, dtype=torch.float64).expand(len(heads), 1, width, width)
        return cls(torch.tensor(heads, dtype=torch.int64)[:, None], eye)

    @classmethod
    def pooled(cls, groups: Sequence[Sequence[int]], matrices: Mapping[int, Tensor]) -> HeadMap:
        """One head for each group: the sum of its heads, each times its matrix [width, width]."""
        most = max(map(len, groups))
        empty = torch.zeros_like(next(iter(matrices.values())))
        rows = [[matrices[h] for h in group] + [empty] * (most - len(group)) for group in groups]
        sources = [[*group, *[group[0]] * (most - len(group))] for group in groups]
        return cls(torch.tensor(sources), torch.stack([torch.stack(row) for row in rows]).double())

    @property
    def heads(self) -> int:
        return len(self.sources)

    @property
    def width(self) -> int:
        return self.matrices.shape[2]

    def rows(self, rows: Tensor) -> Tensor:
        """Rows [H, D, X] of a projection -> [G, new width, X], float64."""
        return torch.einsum("gnab,gnbx->gax", self.matrices, rows.double()[self.sources])

    def bias(self, bias: Tensor) -> Tensor:
        """[H, D] -> [G, new width]."""
        return self.rows(bias[..., None])[..., 0]

    def past(self, rows: Tensor) -> Tensor:
        """Rows of a cache [B, H, P, D] -> [B, G, P, new width], in their type."""
        made = torch.einsum("gnab,pgnlb->pgla", self.matrices.to(rows), rows[:, self.sources])
        return made.to(rows.dtype)

    def after(self, turns: Tensor) -> HeadMap:
        """This map of heads that were multiplied by turns [H, old width, old width] first: x -> x turns[h]."""
        return HeadMap(self.sources, self.matrices @ turns.double().mT[self.sources])

    def plain(self, side: str) -> dict[str, Tensor]:
        """As the arrays of a candidate."""
        return {f"{side} sources": self.sources, f"{side} matrices": self.matrices}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], side: str) -> HeadMap | None:
        found = arrays.get(f"{side} sources")
        return None if found is None else cls(found, arrays[f"{side} matrices"])
