"""Sliding-window attention on long texts: what the mask, understood, is worth on each runtime.

A Mistral-shaped model (random weights, 256 wide, 8 heads on 2, window 512) at 8192 tokens. One attention alone and the whole model,
with a padding mask and without: the graph as it was exported, every kernel that attnopt has for it (onnxruntime's own
GroupQueryAttention with local_window_size, torch's FlexAttention and SDPA with the mask among them), in turn.

    python benchmarks/window.py [--tokens 8192] [--layers 4]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import harness
import torch
import transformers
from harness import Row
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host
from attnopt.patterns import recognise
from attnopt.plan.choose import ORIGINAL, Chosen, applicable, apply_choices, choose_one
from attnopt.plan.judge.verify import difference
from attnopt.plan.timing.timing import in_turn

WINDOW = 512
LEAST = 3.0  # what the best kernel must gain over the exported graph, whole model
Inputs = Mapping[str, Tensor]


class Decoder(nn.Module):
    """The last hidden state, with or without a padding mask [batch, length]."""

    def __init__(self, layers: int, attention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=2, sliding_window=WINDOW, attn_implementation=attention, use_cache=False,
        )  # fmt: skip
        self.model = transformers.MistralModel(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def tokens(length: int, batch: int, padding: bool) -> dict[str, Tensor]:
    ids = torch.randint(0, 1000, (batch, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if padding else {"input_ids": ids}


def onnx_host(layers: int, padding: bool) -> OnnxHost:
    """torch's own export of the eager model, batch and length open."""
    example = tokens(64, 2, padding)
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "window.onnx"
        torch.onnx.export(
            Decoder(layers, "eager").eval(), (), path, kwargs=example, dynamo=True, dynamic_shapes=dynamic, external_data=False,
            verbose=False,
        )  # fmt: skip
        return OnnxHost.from_model(path)


def torch_host(layers: int, padding: bool) -> FxHost:
    return FxHost.from_captured(capture(Decoder(layers, "sdpa").eval(), tokens(64, 2, padding)))


def compare(host: Host, inputs: Inputs, runtime: str, opset: int) -> list[Row]:
    """One attention alone, and the whole model with each kernel in place of every attention."""
    sites = recognise(host.graph).sites
    place = f"{runtime}, {sites[0].spec.mask}"
    alone = choose_one(host, sites[0], inputs, runtime, opset, "measure")
    before = next(c.seconds for c in alone.choices if c.kernel == ORIGINAL)
    assert before is not None
    rows = [Row(f"{place}: one attention", c.kernel, c.seconds, c.seconds / before) for c in alone.choices if c.seconds]
    fits, _ = applicable(sites[0], host, runtime, opset)
    hosts = {ORIGINAL: host} | {x.name: apply_choices(host, [Chosen(s, x, "") for s in sites]) for x in fits}
    runners = {name: h.runner() for name, h in hosts.items()}
    wanted = runners[ORIGINAL](inputs)
    losses = {name: difference(wanted, run(inputs)).max_abs for name, run in runners.items()}
    times = in_turn({name: (lambda run=run: run(inputs)) for name, run in runners.items()}, seconds=2.0, least=3)
    rows += [Row(f"{place}: whole model", name, t.median, t.ratio(times[ORIGINAL]), losses[name]) for name, t in times.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = harness.require_quiet()
    rows: list[Row] = []
    for padding in (True, False):
        inputs = tokens(given.tokens, 1, padding)
        host = onnx_host(given.layers, padding)
        rows += compare(host, inputs, "onnxruntime", host.opset)
        rows += compare(torch_host(given.layers, padding), inputs, "torch", 0)
    columns = ["setting", "kernel", "time", "speed", "largest difference"]
    table = harness.markdown(
        columns,
        [
            [
                r.setting,
                r.contender,
                f"{r.seconds * 1e3:.0f} ms",
                f"{1 / r.ratio:.2f}x",
                "" if r.loss is None else f"{r.loss:.1e}",
            ]
            for r in rows
        ],
    )
    notes = [
        f"{given.tokens} tokens, window {WINDOW}, {given.layers} layers, {torch.get_num_threads()} threads",
        f"other processes used {busy:.2f} cores when it began; medians of runs in turn, speed is the median of paired ratios",
        "the original of onnxruntime is the eager export, that of torch calls SDPA with the mask as a tensor",
    ]
    print(table, *notes, sep="\n")
    path = harness.save("window", rows, notes)
    path.with_suffix(".md").write_text(table + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")
    for setting in {r.setting for r in rows if "whole" in r.setting}:
        best = min(r.ratio for r in rows if r.setting == setting)
        if 1 / best < LEAST:
            sys.exit(f"{setting}: the best kernel is {1 / best:.2f} times as fast as the original, not {LEAST}")


if __name__ == "__main__":
    main()
