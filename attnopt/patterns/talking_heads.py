"""Scores or weights that a learned matrix mixes across heads: named, so that a refusal can say what it is.

    linear(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)          over the heads that a permute brought to the end
    conv2d(scores, w [H, H, 1, 1])                                  heads as channels
    einsum("hg,bgqk->bhqk", w, scores)                              a matmul with a stored square matrix

The language says it as mix(m) before and weight_mix(m) after the softmax; no kernel here makes every head wait for all others.

Source: "Talking-Heads Attention".
"""

from __future__ import annotations

from attnopt.ir.graph import Node, Value
from attnopt.patterns.rounding import operator

REMEDY = "a kernel for mix(m) and weight_mix(m): all heads of a block of rows computed together"


def mixes_heads(node: Node) -> bool:
    """Whether the node puts a stored square matrix over a dimension that is neither rows nor columns of its input."""
    inputs = [i for i in node.inputs if i is not None]
    if node.op == "linear" or (node.op == "matmul" and len(inputs) == 2 and inputs[1].is_constant):
        return is_square(inputs[1]) and heads_last(inputs[0])
    if node.op == "matmul" and len(inputs) == 2 and inputs[0].is_constant:
        return is_square(inputs[0]) and heads_before_pairs(inputs[1])
    if node.op == "opaque" and "conv" in operator(node).lower() and len(inputs) > 1 and inputs[1].is_constant:
        shape = inputs[1].shape or ()
        return len(shape) == 4 and shape[0] == shape[1] and shape[2:] == (1, 1)
    return False


def is_square(weight: Value) -> bool:
    shape = weight.shape or ()
    return weight.is_constant and len(shape) >= 2 and shape[-1] == shape[-2] and all(d == 1 for d in shape[:-2])


def heads_last(value: Value) -> bool:
    """[B, Q, K, H] that a permute made of [B, H, Q, K]."""
    node = value.producer
    while node is not None and node.op in ("reshape", "cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer
    if node is None or node.op != "permute":
        return False
    perm = node.attrs["perm"]
    return len(perm) >= 3 and perm[-1] < len(perm) - 2


def heads_before_pairs(value: Value) -> bool:
    """[B, H, Q * K] that a reshape made of [B, H, Q, K]."""
    node = value.producer
    source = None if node is None or node.op != "reshape" else node.inputs[0]
    return source is not None and source.shape is not None and value.shape is not None and len(source.shape) > len(value.shape)


def said_of(what: str, node: Node) -> str:
    return f"the {what} are mixed across heads by '{operator(node)}' (talking heads), which no kernel here computes"
