"""Losses and times of rewritten models beside the original, and times of large random models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host
from attnopt.passes import GateNorm, MeanPooling
from attnopt.plan.timing.timing import in_turn
from shrinking.methods import applied, kinds_of, offered
from shrinking.rows import Shrunk


def ratio(before: Host, after: Host, inputs: dict[str, Tensor], seconds: float) -> float:
    """Time of `after` as a share of `before`, run in turn."""
    runners = {"before": before.runner(), "after": after.runner()}
    times = in_turn({name: partial(run, inputs) for name, run in runners.items()}, seconds=seconds)
    return float(times["after"].ratio(times["before"]))


def onnx_of(host: Any) -> OnnxHost:
    return OnnxHost.from_model(host.to_onnx())


def compared(subject: Any, quick: bool) -> Iterator[Shrunk]:
    """Every method at every strength, in all layers: loss in torch, time in torch and in onnxruntime."""
    inputs, seconds = dict(subject.judged[0]), 0.2 if quick else 1.0
    exported = onnx_of(subject.torch)
    there = {(k.method, k.strength): k for k in kinds_of(subject, exported, quick)}
    for kind in kinds_of(subject, subject.torch, quick):
        print(f"{subject.name}: {kind.method}, {kind.strength}", flush=True)
        made, twin = applied(subject.torch, kind), there.get((kind.method, kind.strength))
        loss, _ = subject.loss(made.host.runner())
        yield Shrunk(
            subject.name,
            kind.method,
            kind.strength,
            loss.mean,
            loss.half,
            made.weights,
            made.cache,
            ratio(subject.torch, made.host, inputs, seconds),
            None if twin is None else ratio(exported, applied(exported, twin).host, inputs, seconds),
            f"{len(kind.candidates)} layers" if kind.rewrite.per == "block" else "",
        )


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids)[0]


def shaped(quick: bool) -> Iterator[tuple[str, nn.Module]]:
    """Random models of about 100 million parameters: a language model without its head, and an encoder."""
    layers = 2 if quick else 12
    sizes = {"hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12}
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=32000, intermediate_size=2048, num_key_value_heads=12, use_cache=False, attn_implementation="sdpa", **sizes
    )
    yield "llama-shaped, random", transformers.LlamaModel(llama).eval()
    bert = transformers.BertConfig(vocab_size=30522, intermediate_size=3072, attn_implementation="sdpa", **sizes)
    yield "bert-shaped, random", transformers.BertModel(bert).eval()


def random_models(quick: bool) -> list[Shrunk]:
    """Times at one text of 256 tokens; weights are random, so nothing is lost that would mean anything."""
    rows = []
    for name, model in shaped(quick):
        print(f"{name}: trace and export", flush=True)
        inputs = {"input_ids": torch.randint(0, 30000, (1, 64 if quick else 256))}
        host = FxHost.from_captured(capture(Hidden(model).eval(), inputs))
        exported = onnx_of(host)
        layers = len(list(model.parameters())) and model.config.num_hidden_layers
        for rewrite, wanted in (
            (GateNorm(per_head=True), f"{layers // 4} of {layers}"),
            (MeanPooling(groups=(3,)), "3 of 12 heads"),
        ):
            kind = next((k for k in offered(rewrite.name, rewrite, host, None) if k.strength == wanted), None)
            if kind is None:
                continue
            print(f"{name}: {kind.method}, {kind.strength}", flush=True)
            made = applied(host, kind)
            seconds = 0.5 if quick else 6.0
            twin = next(k for k in offered(rewrite.name, rewrite, exported, None) if k.strength == wanted)
            times = ratio(host, made.host, inputs, seconds), ratio(exported, applied(exported, twin).host, inputs, seconds)
            rows.append(Shrunk(name, kind.method, kind.strength, None, None, made.weights, made.cache, *times))
    return rows
