"""An interpreter of canonical graphs with torch: what each operation of the vocabulary means, as an oracle for both hosts.

`check(graph, held)` computes every node from what its inputs hold in the real model and compares with what its outputs hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir.dims import evaluate, solved
from attnopt.ir.graph import Graph, Node, Value

BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.true_divide, "pow": torch.pow,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "maximum": torch.maximum, "minimum": torch.minimum,
    "eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor,
}  # fmt: skip
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in (
        "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu", "erf", "sin", "cos", "floor", "round",
        "isnan", "isinf",
    )},
    "silu": F.silu, "not": torch.logical_not,
}  # fmt: skip
REDUCE: dict[str, Callable[..., Tensor]] = {
    "reduce_sum": torch.sum, "reduce_mean": torch.mean, "reduce_max": torch.amax, "reduce_min": torch.amin, "reduce_any": torch.any,
}  # fmt: skip


class Skipped(Exception):
    """The node cannot be computed from what is known (a bound that only the model knows)."""


def compute(node: Node, x: list[Tensor | None], sizes: dict[str, int]) -> Tensor:
    """One node on tensors."""
    op, a = node.op, node.attrs
    shape = [] if node.output.shape is None else [size(d, sizes) for d in node.output.shape]
    if op in BINARY:
        return BINARY[op](*promoted(x))
    if op in UNARY:
        return UNARY[op](x[0])
    if op in REDUCE:
        return REDUCE[op](x[0], dim=a["axes"], keepdim=a["keepdims"]) if a["axes"] else x[0]
    if op == "where":
        return torch.where(x[0], *promoted(x[1:]))
    if op == "gelu":
        return F.gelu(x[0], approximate=a.get("approximate", "none"))
    if op == "cast":
        return x[0].to(getattr(torch, a.get("dtype") or node.output.dtype))
    if op == "permute":
        return x[0].permute(a["perm"])
    if op == "reshape":
        return x[0].reshape(shape)
    if op == "expand":
        return x[0].expand(shape)
    if op == "matmul":
        return x[0] @ x[1]
    if op == "linear":
        return F.linear(x[0], x[1], x[2] if len(x) > 2 else None)
    if op == "softmax":
        return x[0].softmax(a["axis"])
    if op == "cumsum":
        return x[0].cumsum(a["axis"])
    if op == "slice":
        start, stop, step = (None if a[name] is None else size(a[name], sizes) for name in ("start", "stop", "step"))
        if start is None or step is None or (stop is None and shape[a["axis"]] != x[0].shape[a["axis"]] - start):
            raise Skipped
        index = [slice(None)] * x[0].ndim
        index[a["axis"]] = slice(start, stop, step)
        return x[0][tuple(index)]
    if op == "concat":
        return torch.cat(x, a["axis"])
    if op == "gather":
        index = x[1] % x[0].shape[a["axis"]]
        flat = x[0].index_select(a["axis"], index.reshape(-1))
        return flat.reshape(*x[0].shape[: a["axis"]], *index.shape, *x[0].shape[a["axis"] + 1 :])
    if op == "index":
        first = a["axes"][0]
        at = [i % n for i, n in zip(x[1:], x[0].shape[first:], strict=False)]
        return x[0][(slice(None),) * first + tuple(at)]
    if op == "iota":
        return (torch.arange(shape[0]) * a.get("step", 1) + size(a.get("start", 0), sizes)).to(getattr(torch, node.output.dtype))
    if op == "full":
        return torch.full(shape, a["value"], dtype=getattr(torch, node.output.dtype))
    if op == "triangle":
        return (torch.triu if a["upper"] else torch.tril)(x[0], a["diagonal"])
    if op == "scatter":
        return x[0].index_copy(a["axis"], x[1], x[2])
    if op == "layer_norm":
        return F.layer_norm(x[0], x[0].shape[-1:], x[1], x[2] if len(x) > 2 else None, a["eps"])
    if op == "rms_norm":
        return F.rms_norm(x[0], x[0].shape[-1:], x[1], a["eps"])
    if op == "attention":
        return attention(*x, causal=a["causal"], scale=a["scale"], softcap=a.get("softcap") or 0.0)
    raise Skipped


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool, scale: float, softcap: float
) -> Tensor:
    repeat = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) if repeat else t for t in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


def promoted(x: list[Tensor | None]) -> list[Tensor]:
    """A number meets a tensor in the tensor's type."""
    dtypes = [t.dtype for t in x if t is not None and t.ndim] or [t.dtype for t in x if t is not None]
    widest = max(dtypes, key=lambda d: (d.is_floating_point, d.itemsize))
    return [
        t
        if t.dtype.is_floating_point == widest.is_floating_point or t.ndim
        else t.to(torch.result_type(t, torch.empty(1, dtype=widest)))
        for t in x
    ]


def size(dim: Any, sizes: dict[str, int]) -> Any:
    if isinstance(dim, float):
        return dim
    try:
        return evaluate(dim, sizes)
    except KeyError:
        raise Skipped from None


def learn(value: Value, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Take over the symbols that a shape tells; a symbol must mean one size everywhere."""
    assert value.shape is not None and len(value.shape) == tensor.ndim, (value, tensor.shape)
    for dim, got in zip(value.shape, tensor.shape, strict=True):
        if (found := solved(dim, got)) is not None:
            assert sizes.setdefault(*found) == found[1], (value, dim, got, sizes)
    for dim, got in zip(value.shape, tensor.shape, strict=True):
        if isinstance(dim, int) or set(dim.names) <= set(sizes):
            assert evaluate(dim, sizes) == got, (value, tensor.shape, sizes)


def check(graph: Graph, held: Mapping[Value, Tensor], *, tolerance: float = 1e-4) -> int:
    """Compare every node that can be computed; returns how many were. `held` has the values that exist in the host."""
    known: dict[Value, Tensor] = dict(held)
    sizes: dict[str, int] = {}
    for value, tensor in held.items():
        if value.shape is not None:
            learn(value, tensor, sizes)
    compared = 0
    for node in graph.nodes:
        inputs = [None if i is None else known.get(i, given(i, sizes)) for i in node.inputs]
        if node.op == "opaque" or any(i is not None and t is None for i, t in zip(node.inputs, inputs, strict=True)):
            continue
        try:
            made = compute(node, inputs, sizes)
        except Skipped:
            continue
        wanted = known.get(node.output)
        if wanted is None:
            known[node.output] = made
            continue
        assert made.shape == wanted.shape, (node, made.shape, wanted.shape)
        assert made.dtype == wanted.dtype or node.op not in ("cast", "matmul", "reshape", "permute"), (
            node,
            made.dtype,
            wanted.dtype,
        )
        torch.testing.assert_close(
            made.to(wanted.dtype), wanted, atol=tolerance, rtol=tolerance, equal_nan=True, msg=lambda m, node=node: f"{node}\n{m}"
        )
        compared += 1
    return compared


def given(value: Value, sizes: dict[str, int]) -> Tensor | None:
    """What needs no node: constants, and numbers that are sizes of the graph."""
    if value.load is not None:
        return value.load()
    if value.sizes is None or value.handle is not None:
        return None
    held = torch.tensor([evaluate(d, sizes) for d in value.sizes])
    return held if value.shape else held[0]


def values_in_host(graph: Graph) -> list[Value]:
    """Every value that a node makes and the host holds."""
    return [v for node in graph.nodes for v in node.outputs if v.handle is not None and v.dtype]
