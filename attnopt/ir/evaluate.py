"""The meaning of index expressions in tensors: every index is an arange, every operator a torch function.

    evaluate(parse_expr("causal & window(4)"), Grid(1, 1, 8, 8))  ->  bool tensor [1, 1, 8, 8]

The grid is broadcast, never expanded: a bias of (h, q - k) stays [1, H, Q, K]. Sizes `size(q)`, `size(k)` are the grid's.
Numbers follow Python: whole numbers are int64, others float64 until they meet an operand, whose dtype they then take; true and
false count as 1 and 0; `/`, `exp`, `pow`, … of whole numbers are float64; `//` and `%` floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.expr import Const, Expr, Index, Load, Size, Term, expand_term


@dataclass(frozen=True)
class Grid:
    """The iteration space: batch x heads x queries x keys, on a device.

    offset: absolute position of query 0. sizes: lengths by name, besides q and k. q_step, k_step: visit every so many queries
    and keys only. first_row: number of the first query, where the grid is a block of rows of a longer one.
    """

    batch: int
    heads: int
    q_len: int
    kv_len: int
    offset: int = 0
    device: torch.device | str = "cpu"
    sizes: Mapping[str, int] = field(default_factory=dict)
    q_step: int = 1
    k_step: int = 1
    first_row: int = 0

    def index(self, name: str) -> Tensor:
        axis = {"b": 0, "h": 1, "q": 2, "row": 2, "k": 3}[name]
        length = (self.batch, self.heads, self.q_len, self.kv_len)[axis]
        values = torch.arange(0, length, (1, 1, self.q_step, self.k_step)[axis], device=self.device)
        if axis == 2:
            values = values + self.first_row
        return (values + self.offset if name == "q" else values).view([-1 if i == axis else 1 for i in range(4)])

    def size(self, name: str) -> int:
        sizes = {"q": self.q_len, "k": self.kv_len, **self.sizes}
        if name not in sizes:
            raise InputMismatch(
                f"the length '{name}' is not known here", where=f"size({name})", next_move=f"Known: {', '.join(sizes)}."
            )
        return sizes[name]


Function = Callable[..., Tensor]


def _logical(function: Function) -> Function:
    return lambda *a: function(*(x.bool() for x in a))


def _number(x: Tensor) -> Tensor:
    return x.long() if x.dtype == torch.bool else x


def _arithmetic(function: Function) -> Function:
    return lambda *a: function(*map(_number, a))


def _real(function: Function) -> Function:
    return lambda *a: function(*(x if x.is_floating_point() else x.double() for x in a))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; two whole numbers give float64, a whole number beside a real one takes its dtype."""
    real = a.is_floating_point() or b.is_floating_point()
    return torch.true_divide(a, b) if real else torch.true_divide(a.double(), b.double())


FUNCTIONS: dict[str, Function] = {
    "or": _logical(torch.logical_or),
    "and": _logical(torch.logical_and),
    "not": _logical(torch.logical_not),
    **{
        name: _arithmetic(getattr(torch, name))
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul", "neg", "abs")
    },
    "div": _arithmetic(_divide),
    "floordiv": _arithmetic(torch.floor_divide),
    "mod": _arithmetic(torch.remainder),
    "min": _arithmetic(torch.minimum),
    "max": _arithmetic(torch.maximum),
    **{name: _real(getattr(torch, name)) for name in ("exp", "log", "tanh", "sqrt", "sin", "cos", "sigmoid", "pow")},
    "floor": lambda a: torch.floor(a) if a.is_floating_point() else _number(a),
    "int": lambda a: a.trunc().long() if a.is_floating_point() else a.long(),
    "float": lambda a: a if a.is_floating_point() else a.double(),
    "float32": lambda a: a.float(),
    "where": lambda c, a, b: torch.where(c.bool(), a, b),
}


def evaluate(expr: Expr, grid: Grid, operands: Mapping[str, Tensor] | None = None) -> Tensor:
    """The expression on the whole grid, broadcastable to [batch, heads, q_len, kv_len].

    Raises InputMismatch for an operand that is missing, has another rank than the expression reads, or is read outside.
    """
    operands = operands or {}
    if isinstance(expr, Index):
        return grid.index(expr.name)
    if isinstance(expr, Const):
        kind = torch.float64 if isinstance(expr.value, float) else None
        return torch.tensor(expr.value, device=grid.device, dtype=kind)
    if isinstance(expr, Size):
        return torch.tensor(grid.size(expr.name), device=grid.device)
    if isinstance(expr, Term):
        return evaluate(expand_term(expr), grid, operands)
    if isinstance(expr, Load):
        return _load(expr, grid, operands)
    return FUNCTIONS[expr.op](*(evaluate(a, grid, operands) for a in expr.args))


def _load(expr: Load, grid: Grid, operands: Mapping[str, Tensor]) -> Tensor:
    if expr.operand not in operands:
        raise InputMismatch(
            f"the spec loads '{expr.operand}', which was not given", where=str(expr), next_move=f"Pass {expr.operand}=tensor."
        )
    tensor = operands[expr.operand]
    if tensor.ndim != len(expr.indices):
        raise InputMismatch(
            f"operand '{expr.operand}' has {tensor.ndim} dimensions, the spec reads {len(expr.indices)}",
            where=str(expr),
            next_move="Give it that shape, or write the load with other indices.",
        )
    where = tuple(evaluate(index, grid, operands).long() for index in expr.indices)
    for axis, index in enumerate(where):
        low, high = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
        if low < 0 or high >= tensor.shape[axis]:
            raise InputMismatch(
                f"operand '{expr.operand}' of shape {list(tensor.shape)} is read from {low} to {high} along dimension {axis}",
                where=str(expr),
                next_move="Give a larger operand, write 0 for a dimension it does not vary in, or clamp the index with min and max.",
            )
    return tensor[where] if where else tensor
