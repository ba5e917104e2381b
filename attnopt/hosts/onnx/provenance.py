"""Where nodes come from that are written in place of others: what the exporter wrote down of those, its long texts once.

    MatMul {scopes, stack trace, …}   ->   MatMulInteger {scopes, stack trace, …}, Cast {scopes}, Mul {scopes}, Mul {scopes}

The name of the module is in every node's scopes. A stack trace and the classes around it take 1.5 kB, and five nodes for each layer would
make a tenth of a small model's file of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

TRACE = "pkg.torch.onnx.stack_trace"
LONG = (TRACE, "namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.fx_node")
NEAR = 64  # nodes written last among which one of the same origin is looked for


def inherit(made: ir.Node, origin: ir.Node, written: Sequence[ir.Node]) -> None:
    """Give a new node the metadata of the node in whose place it stands; written: those made so far, some of the same origin."""
    texts = dict(origin.metadata_props)
    trace = texts.get(TRACE)
    if trace is not None and any(node.metadata_props.get(TRACE) == trace for node in written[-NEAR:]):
        texts = {key: text for key, text in texts.items() if key not in LONG}
    made.metadata_props.update(texts)
