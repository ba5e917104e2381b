"""What quantised graphs put between scores, weights and values: named, so that a refusal can say what it is.

    scores -> QuantizeLinear -> DequantizeLinear -> softmax         the scores are rounded
    MatMulInteger(q_int8, k_int8) -> softmax                        queries and keys are multiplied as whole numbers

No kernel here rounds at those places, and leaving the rounding out would change the model; around q, k and v it may stay.
"""

from __future__ import annotations

from attnopt.ir.graph import Node

WHOLE_NUMBERS = ("matmulinteger", "qlinearmatmul", "qgemm", "int_mm")


def operator(node: Node) -> str:
    """The host's name of an opaque node, the canonical one of any other."""
    return str(node.attrs.get("operator", node.op))


def rounds(node: Node) -> bool:
    """Whether it only brings its input to fewer values, or back from them."""
    return node.op == "opaque" and "quantize" in operator(node).lower()


def multiplies(node: Node) -> bool:
    """Whether it is a product of two quantised tensors, neither of them stored."""
    if node.op != "opaque" or not any(word in operator(node).lower() for word in WHOLE_NUMBERS):
        return False
    return sum(i is not None and not i.is_constant and len(i.shape or ()) >= 2 for i in node.inputs) >= 2
