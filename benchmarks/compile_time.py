"""How long recognition takes, and that it is linear in the number of layers.

Llama graphs of growing depth (small width: recognition does not look at weights), through both hosts: translation to the canonical
graph and recognition, against onnxscript's ort_fusions rewriter on the same ONNX graph.

A last row shows an ONNX graph of 100,000 nodes without shapes (see `long_graph`), which no exporter makes in reasonable time.

    python benchmarks/compile_time.py
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import harness
import long_graph
import onnx_ir
import torch
import transformers
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

LAYERS = (4, 8, 16, 32, 64)
LIMIT = 2.0  # seconds for 32 layers
LONG, LONG_LIMIT = 1200, 20.0  # layers that make 100,000 nodes; seconds for them


@dataclass(frozen=True)
class Timed:
    layers: int
    nodes: int
    found: int
    torch_seconds: float
    onnx_seconds: float
    rewriter_seconds: float
    rewriter_found: int


def least(call: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of some runs: what the work takes when nothing interferes."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def llama(layers: int) -> FxHost:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 16))
    return FxHost.from_captured(capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}))


def timed(layers: int) -> Timed:
    host = llama(layers)
    proto = host.to_onnx()
    onnx_host = OnnxHost.from_model(proto)

    def again(subject: FxHost | OnnxHost) -> int:
        subject._graph = None
        return len(recognise(subject.graph).sites)

    copies = [onnx_ir.serde.deserialize_model(copy.deepcopy(proto)) for _ in range(3)]
    counts: list[int] = []

    def rewrite() -> None:
        made, _ = optimize_for_ort(copies.pop())
        counts.append(sum(n.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention") for n in made.graph))

    return Timed(
        layers,
        len(proto.graph.node),
        again(onnx_host),
        least(lambda: again(host)),
        least(lambda: again(onnx_host)),
        least(rewrite, 3),
        counts[0],
    )


def long() -> Timed:
    """Translation, shape inference included, and recognition of a very long graph; through the ONNX host alone."""
    host = OnnxHost.from_model(long_graph.model(LONG))
    nodes = len(host.model.graph)
    started = time.perf_counter()
    found = len(recognise(host.graph).sites)
    return Timed(LONG, nodes, found, math.nan, time.perf_counter() - started, math.nan, 0)


def seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} s"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = harness.require_quiet()
    rows = [timed(layers) for layers in LAYERS]
    slope = {
        name: getattr(rows[-1], name) / getattr(rows[-2], name) for name in ("torch_seconds", "onnx_seconds", "rewriter_seconds")
    }
    rows.append(long())
    columns = ["layers", "ONNX nodes", "attentions found", "attnopt torch", "attnopt onnx", "onnxscript ort_fusions", "it fused"]
    table = harness.markdown(
        columns,
        [
            [str(r.layers), str(r.nodes), str(r.found), *map(seconds, (r.torch_seconds, r.onnx_seconds, r.rewriter_seconds)),
             str(r.rewriter_found)]
            for r in rows
        ],
    )  # fmt: skip
    notes = [
        f"other processes used {busy:.2f} cores when it began; least of 5 runs (3 for the rewriter)",
        *(f"{name.split('_')[0]}: 64 layers take {ratio:.2f} times as long as 32" for name, ratio in slope.items()),
    ]
    print(table, *notes, sep="\n")
    path = harness.save("compile_time", rows, notes)
    path.with_suffix(".md").write_text(table + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")
    if rows[-1].onnx_seconds > LONG_LIMIT:
        raise SystemExit(f"{rows[-1].nodes} nodes took {rows[-1].onnx_seconds:.1f} s; {LONG_LIMIT} s are allowed")
    at_32 = next(r for r in rows if r.layers == 32)
    if max(at_32.torch_seconds, at_32.onnx_seconds) > LIMIT or any(r.found != r.layers for r in rows):
        raise SystemExit(f"recognition of 32 layers took more than {LIMIT} s, or missed attentions")


if __name__ == "__main__":
    main()
