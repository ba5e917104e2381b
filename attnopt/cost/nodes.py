"""The price of nodes of a graph as they are: linear layers, passes over tensors, moves of data, and what each node costs by itself.

    estimate_nodes(graph.nodes, {"batch": 8, "length": 128}, cpu)   ->   the whole model, attentions spelled out as they stand
    estimate_rest(graph, sites, sizes, cpu)                         ->   the same without the attentions

With `estimate` for each attention under a kernel this is the time of a whole model under a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from attnopt.cost.estimate import NOTHING, Estimate, estimate, estimate_linear, of_phases
from attnopt.cost.phase import Phase
from attnopt.cost.target import Target
from attnopt.ir.cost import WIDTHS
from attnopt.ir.dims import Dim, evaluate
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Site
from attnopt.ir.spec import parse

FREE = ("reshape", "expand", "full")  # views, on either runtime; a permute is one until a product or a copy reads it
VIEWS = ("permute", "slice")
WORK = {
    "softmax": 5,
    "layer_norm": 8,
    "rms_norm": 5,
    "gelu": 10,
    "silu": 6,
    "tanh": 6,
    "exp": 4,
    "erf": 8,
    "sin": 6,
    "cos": 6,
    "sigmoid": 5,
}


def estimate_rest(
    graph: Graph, sites: Sequence[Site], sizes: Mapping[str, int], target: Target, *, runtime: str = "torch"
) -> Estimate:
    """Everything but the attentions: projections, norms, rotations, the layers between."""
    inside = {id(node) for site in sites for node in site.nodes}
    return estimate_nodes((n for n in graph.nodes if id(n) not in inside), sizes, target, runtime=runtime)


def estimate_nodes(
    nodes: Iterable[Node],
    sizes: Mapping[str, int],
    target: Target,
    *,
    runtime: str = "torch",
    weights: Mapping[str, str] | None = None,
    widths: Mapping[str, tuple[int, int]] | None = None,
) -> Estimate:
    """The sum over nodes. sizes: of the symbols. weights: how a plan stores those of a linear node, by its name ("int8"); widths: its
    (in, out) under a plan.

    A node whose size is not known costs its launch alone.
    """
    kept = weights or {}
    others = widths or {}
    found = [(n, estimate_node(n, sizes, target, runtime, kept.get(n.name, ""), others.get(n.name))) for n in nodes]
    whole = sum((e for _, e in found), NOTHING)
    spent: dict[str, float] = {}
    for _, each in found:
        spent[each.bound] = spent.get(each.bound, 0.0) + each.seconds
    if not whole.seconds:
        return NOTHING
    bound = max(spent, key=spent.__getitem__)
    node, longest = max(found, key=lambda f: f[1].seconds)
    why = f"{spent[bound] / whole.seconds:.0%} of the time is bound by {bound}; longest: {node.name}, {longest.why}"
    return replace(whole, bound=bound, why=why)


def estimate_node(
    node: Node,
    sizes: Mapping[str, int],
    target: Target,
    runtime: str = "torch",
    weights: str = "",
    width: tuple[int, int] | None = None,
) -> Estimate:
    if node.op in FREE or (node.op in VIEWS and runtime == "torch") or all(v.handle is None for v in node.outputs):
        return NOTHING
    dtype = node.output.dtype or "float32"
    known = dtype if dtype in WIDTHS else "float32"
    out = shape_of(node.output, sizes)
    if node.op in ("linear", "matmul") and out is not None and len(node.inputs) > 1:
        if width is not None:
            return estimate_linear(math.prod(out[:-1]), *width, known, weights, target=target, runtime=runtime)
        return product(node, out, known, sizes, target, runtime, weights)
    if node.op == "attention" and (shape := attention_shape(node, sizes)) is not None:
        spec = parse("softmax causal" if node.attrs.get("causal") else "softmax")
        return estimate(spec, shape, known, "sdpa" if runtime == "torch" else "onnx-attention", target=target)
    numbers = 0.0 if out is None else float(math.prod(out))
    moved = sum(bytes_of(v, sizes) for v in (*node.inputs, *node.outputs) if v is not None and not small(v, sizes))
    name = "ort-elementwise" if runtime == "onnxruntime" else "elementwise"
    phase = Phase(node.op, name, operations=numbers * WORK.get(node.op, 1), bytes=moved, working_set=moved)
    return of_phases([phase], known, target)


def product(
    node: Node, out: tuple[int, ...], dtype: str, sizes: Mapping[str, int], target: Target, runtime: str, weights: str
) -> Estimate:
    """A product with a constant on the right is a linear layer; one of two tensors is a batch of products."""
    data, right = node.inputs[0], node.inputs[1]
    inside = None if data is None else shape_of(data, sizes)
    if inside is None or right is None or not out:
        return NOTHING
    width = inside[-1]
    if right.is_constant and len(right.shape or ()) == 2:
        return estimate_linear(math.prod(out[:-1]), width, out[-1], dtype, weights, target=target, runtime=runtime)
    moved = sum(bytes_of(v, sizes) for v in (data, right, node.output) if v is not None)
    rows = out[-2] if len(out) > 1 else 1
    name = "ort-eager" if runtime == "onnxruntime" else "eager"
    tasks = math.prod(out[:-2])
    phase = Phase("products", name, flops=2.0 * math.prod(out) * width, bytes=moved, working_set=moved, rows=rows, tasks=tasks)
    return of_phases([phase], dtype, target)


def attention_shape(node: Node, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """b, h, g, q, k, d, e of an attention that is one node already."""
    held = [None if v is None else shape_of(v, sizes) for v in node.inputs[:3]]
    if len(held) < 3 or any(s is None or len(s) not in (3, 4) for s in held):
        return None
    q, k, v = ((1, *s) if len(s) == 3 else s for s in held if s is not None)
    return {"b": q[0], "h": q[1], "g": k[1], "q": q[2], "k": k[2], "d": q[3], "e": v[3]}


def shape_of(value: Value, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    def size(dim: Dim) -> int:
        return evaluate(dim, sizes)

    try:
        return None if value.shape is None else tuple(map(size, value.shape))
    except KeyError:
        return None


def bytes_of(value: Value, sizes: Mapping[str, int]) -> float:
    """Of a tensor; one whose size is not known counts as nothing."""
    shape = shape_of(value, sizes)
    return 0.0 if shape is None else math.prod(shape) * WIDTHS.get(value.dtype, 64 if value.dtype == "int64" else 32) / 8


def small(value: Value, sizes: Mapping[str, int]) -> bool:
    """Constants of a few numbers stay in registers."""
    shape = shape_of(value, sizes)
    return shape is not None and math.prod(shape) <= 16
