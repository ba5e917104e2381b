"""How many attentions other optimisers fuse, on a fixed sample of model types, beside what attnopt finds.

torch's `fuse_attention` patterns (the joint graph passes of torch.compile, without code generation), onnxruntime's transformers
optimizer and onnxscript's `ort_fusions` on torch's ONNX export, onnxruntime's also on the TorchScript export that it was written for,
and transformers' OnnxExporter with `ort_fusions="cpu"`: the model as it
is, the prefill of a generating model (with a cache as output) and its decode step (with a cache as input). A type counts as wholly fused
where as many attention operators come out as it has attentions.

    python benchmarks/zoo_peers.py [--types bert llama] [--attention eager sdpa] [--jobs 2]
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness
import onnx
import onnx_ir
import torch
import transformers
from zoo.examples import Inputs
from zoo.measure import said
from zoo.run import forked, warm_up
from zoo.subject import Subject, subject
from zoo.table import share
from zoo.truth import Truth

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

TYPES = (
    "albert", "bart", "bert", "bloom", "clip", "deberta-v2", "distilbert", "falcon", "gemma2", "gpt2", "gpt_neox", "gptj", "llama",
    "mistral", "opt", "phi3", "qwen3", "t5", "vit", "whisper",
)  # fmt: skip
GENERATING = ("bart", "bloom", "falcon", "gemma2", "gpt2", "gpt_neo", "gptj", "llama", "mistral", "opt", "phi3", "qwen3", "t5")
FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
OPTIMIZER_TYPES = {"bart": "bart", "clip": "clip", "gpt2": "gpt2", "t5": "t5", "vit": "vit", "phi3": "phi"}  # others: bert
LIMIT = 300  # seconds of processor time for all peers on one type


@dataclass
class Counts:
    """Fused attentions of one type by peer; a text where the peer failed."""

    model_type: str
    attention: str
    truth: int = 0
    error: str = ""
    fused: dict[str, int | str] = field(default_factory=dict)

    def add(self, peer: str, count: Callable[[], int]) -> None:
        try:
            self.fused[peer] = count()
        except Exception as failure:
            self.fused[peer] = said(failure)


def fused_count(proto: onnx.ModelProto) -> int:
    return sum(n.op_type in FUSED for graph in (proto.graph, *proto.functions) for n in graph.node)


def torch_patterns(made: Subject) -> int:
    """What the passes of torch.compile replace: its own tracing and decompositions, and its joint graph passes."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._guards import detect_fake_mode
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    def passes(graph: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
        with V.set_fake_mode(detect_fake_mode(example)):
            joint_graph_passes(graph)
        return make_boxed_func(graph.forward)

    counters.clear()
    backend = aot_autograd(fw_compiler=passes, inference_compiler=passes, decompositions=select_decomp_table)
    with torch.no_grad():
        torch.compile(made.model, backend=backend, dynamic=False)(**made.inputs)
    return int(counters["inductor"]["fuse_attention"])


def onnxruntime_optimizer(path: Path, made: Subject) -> int:
    from onnxruntime.transformers.optimizer import optimize_model

    config = made.model.config.get_text_config()
    found = optimize_model(
        str(path), OPTIMIZER_TYPES.get(made.model_type, "bert"), num_heads=config.num_attention_heads, hidden_size=config.hidden_size,
        opt_level=1,
    )  # fmt: skip
    return fused_count(found.model)


class FirstOutput(torch.nn.Module):
    """What the TorchScript exporter can take: tensors by position in, one tensor out."""

    def __init__(self, made: Subject) -> None:
        super().__init__()
        self.model = made.model
        self.names = [name for name, x in made.inputs.items() if isinstance(x, torch.Tensor)]
        self.options = {name: x for name, x in made.inputs.items() if name not in self.names}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.options)[0]


def on_torchscript(path: Path, made: Subject) -> int:
    module = FirstOutput(made).eval()
    tensors = tuple(made.inputs[name] for name in module.names)
    axes = {name: {0: "batch", 1: "sequence"} for name in module.names}
    with torch.no_grad():
        torch.onnx.export(
            module,
            tensors,
            path,
            dynamo=False,
            opset_version=17,
            input_names=module.names,
            output_names=["out"],
            dynamic_axes=axes,
        )
    return onnxruntime_optimizer(path, made)


def ort_fusions(path: Path) -> int:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    found, _ = optimize_for_ort(onnx_ir.load(path))
    return fused_count(onnx_ir.to_proto(found))


def onnx_exporter(model: torch.nn.Module, inputs: Inputs) -> int:
    from transformers.exporters import OnnxConfig, OnnxExporter

    exported = OnnxExporter().export(model, dict(inputs), config=OnnxConfig(dynamic=True, ort_fusions="cpu"))
    return fused_count(onnx_ir.to_proto(exported.program))


def generation(made: Subject) -> dict[str, tuple[torch.nn.Module, Inputs]]:
    """The two steps of a generating model as the exporter itself takes them apart: a prefill that gives a cache, a decode that takes it."""
    from transformers.exporters.utils import decompose_prefill_decode

    mapping = transformers.AutoModelForCausalLM
    if made.model.config.is_encoder_decoder:
        mapping = transformers.AutoModelForSeq2SeqLM
    config = copy.deepcopy(made.model.config)
    config.use_cache = True
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # T5 leaves it to its files
    model = mapping.from_config(config, attn_implementation=made.attention).eval()
    return decompose_prefill_decode(model, {name: made.inputs[name] for name in ("input_ids", "attention_mask")})


def counted(model_type: str, attention: str) -> Counts:
    """All peers on one type."""
    counts = Counts(model_type, attention)
    try:
        made = subject(model_type, attention)
        captured = capture(made.model, made.inputs)
        host = FxHost.from_captured(captured)
    except Exception as failure:
        counts.error = said(failure)
        return counts
    counts.truth = len(Truth(host.module.graph).softmaxes)
    counts.add("attnopt, torch", lambda: len(recognise(host.graph).sites))
    counts.add("torch fuse_attention", lambda: torch_patterns(made))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            onnx.save(host.to_onnx(), path)
        except Exception as failure:
            counts.error = f"ONNX export: {said(failure)}"
        else:
            counts.add("attnopt, ONNX", lambda: len(recognise(OnnxHost.from_model(path).graph).sites))
            counts.add("onnxruntime optimizer", lambda: onnxruntime_optimizer(path, made))
            counts.add("onnxruntime optimizer, TorchScript", lambda: on_torchscript(path.with_name("script.onnx"), made))
            counts.add("onnxscript ort_fusions", lambda: ort_fusions(path))
    counts.add("transformers OnnxExporter", lambda: onnx_exporter(made.model, made.inputs))
    if made.model_type in GENERATING:
        for stage in ("prefill", "decode"):
            counts.add(f"transformers OnnxExporter, {stage}", lambda stage=stage: onnx_exporter(*generation(made)[stage]))
    return counts


def cell(counts: Counts, peer: str) -> str:
    found = counts.fused.get(peer)
    if found is None:
        return ""
    return f"{found}/{counts.truth}" if isinstance(found, int) else "fails"


def totals(found: Sequence[Counts], peers: Sequence[str]) -> list[str]:
    lines = []
    for attention in dict.fromkeys(c.attention for c in found):
        for peer in peers:
            tried = [c for c in found if c.attention == attention and peer in c.fused]
            whole = [c for c in tried if isinstance(n := c.fused[peer], int) and n >= c.truth > 0]
            failed = sum(isinstance(c.fused[peer], str) for c in tried)
            lines.append(
                f"{attention}, {peer}: {share(len(whole), len(tried))} types wholly fused" + f", {failed} fail" * bool(failed)
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], choices=["eager", "sdpa"])
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    warm_up()
    found = []
    for case, counts in forked(counted, [(t, a) for a in asked.attention for t in asked.types], asked.jobs, LIMIT):
        found.append(counts if isinstance(counts, Counts) else Counts(*case, error=counts))
        print(case, found[-1].truth, found[-1].error, found[-1].fused, flush=True)
    peers = list(dict.fromkeys(p for c in found for p in c.fused))
    notes = totals(found, peers)
    table = harness.markdown(
        ["type", "attention", *peers], [[c.model_type, c.attention, *(cell(c, p) for p in peers)] for c in found]
    )
    failures = [
        f"{c.model_type} ({c.attention}), {p}: {why}" for c in found for p, why in c.fused.items() if isinstance(why, str)
    ]
    failures += [f"{c.model_type} ({c.attention}): {c.error}" for c in found if c.error]
    print(table, *notes, sep="\n")
    if asked.types == list(TYPES):
        path = harness.save("zoo_peers", found, notes)
        text = [table, *(f"- {n}" for n in notes), "", "Failures:", "", *(f"- {f}" for f in failures)]
        path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
