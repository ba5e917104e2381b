"""Rows: all that the functions of the reference read of one attention while it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr, indices
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """A spec on its grid with its operands."""

    spec: AttentionSpec
    grid: Grid
    operands: Mapping[str, Tensor]
    dtype: torch.dtype

    def value(self, expr: Expr, may_use: str = "bhqk") -> Tensor:
        """The expression in the dtype of the call, [B|1, H|1, Q|1, K|1]; `may_use` says along which axes it may vary."""
        if beyond := indices(expr) - {*may_use, *(("row",) if "q" in may_use else ())}:
            raise InputMismatch(
                f"'{expr}' varies along {', '.join(sorted(beyond))}", next_move=f"Here it may depend on {may_use}."
            )
        return evaluate(expr, self.grid, self.operands).to(self.dtype)

    def mask(self, expr: Expr) -> Tensor:
        """The expression as bool [B, H, Q, K]."""
        grid = self.grid
        return evaluate(expr, grid, self.operands).bool().expand(grid.batch, grid.heads, grid.q_len, grid.kv_len)

    def row_value(self, expr: Expr) -> Tensor:
        """[B, H, Q, 1]."""
        return self.value(expr, "bhq").expand(self.grid.batch, self.grid.heads, self.grid.q_len, 1)

    def key_value(self, expr: Expr) -> Tensor:
        """[B, H, K, 1]."""
        return self.value(expr, "bhk").expand(self.grid.batch, self.grid.heads, 1, self.grid.kv_len).transpose(-1, -2)

    def operand(self, clause: Clause, option: int | str) -> Tensor:
        """The tensor that the clause names there."""
        name = clause.operand(option)
        if name is None:
            raise InputMismatch(f"{clause} needs the option {option}=", next_move=f"Write {option}=name and pass name=tensor.")
        if name not in self.operands:
            raise InputMismatch(
                f"the spec reads '{name}', which was not given", where=str(clause), next_move=f"Pass {name}=tensor."
            )
        return self.operands[name].to(self.dtype)

    def operand_or_none(self, clause: Clause, option: int | str) -> Tensor | None:
        return None if clause.operand(option) is None else self.operand(clause, option)


@dataclass(frozen=True)
class Rows:
    """q [B, H, Q, D], k [B, H, K, D], v [B, H, K, E] as they enter the products; scores and visible [B, H, Q, K].

    key_heads [H]: which key head each query head reads. denominators: scores that a linear normaliser sums, where they are others
    than those that weigh the values. sink [B, H, Q, 1]. factor: what the selection multiplies the finished weights by.
    """

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    visible: Tensor
    key_heads: Tensor
    denominators: Tensor | None = None
    sink: Tensor | None = None
    factor: Tensor | None = None

    @property
    def spec(self) -> AttentionSpec:
        return self.call.spec

    @property
    def q_position(self) -> Tensor:
        """Absolute positions of the queries, [Q, 1]."""
        return self.call.grid.index("q")[0, 0]

    @property
    def k_position(self) -> Tensor:
        """[1, K]."""
        return self.call.grid.index("k")[0, 0]

    def by_group(self, x: Tensor, how: str = "mean") -> Tensor:
        """Average a quantity [B, H, …] over the query heads that share a key head; each head then has the average."""
        if how == "none":
            return x
        same = (self.key_heads[:, None] == self.key_heads[None]).to(x.dtype)
        return torch.einsum("hg,bg...->bh...", same / same.sum(1, keepdim=True), x)

    def per_head(self, x: Tensor, axis: int) -> Tensor:
        """An operand whose axis counts key heads, repeated for the query heads; unchanged where it has H or 1 of them."""
        if x.shape[axis] in (1, len(self.key_heads)):
            return x
        return x.index_select(axis, self.key_heads)
