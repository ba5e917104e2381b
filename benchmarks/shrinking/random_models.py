"""Times of random models shaped like Llama and BERT, of about 100 million parameters, and what removing a quarter of attention should give.

Weights are random, so nothing is lost that would mean anything. What a quarter should give is told by the clock of the untouched torch
model, in which attention with its norm takes a share s of the whole call: 1 / (1 - s / 4) times the throughput.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.passes import EigenAttention, GateNorm, KeyNormGroups, MeanPooling, Pass, PruneHeads
from attnopt.plan.options.groups import Grouping
from shrinking.kept import Kept
from shrinking.methods import applied, offered
from shrinking.rows import Shrunk
from shrinking.timing import onnx_of, ratio

REWRITES: tuple[Pass, ...] = (
    GateNorm(per_head=True),
    MeanPooling(groups=(3,)),
    KeyNormGroups(groups=(3,)),
    PruneHeads(shares=(0.25,)),
    EigenAttention(thresholds=(0.6,)),
)
ROUNDS = 5


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids)[0]


@dataclass
class Random:
    """attention: the modules that go with an attention layer, of the whole model."""

    name: str
    model: nn.Module
    layers: int
    quick: bool
    attention: list[nn.Module] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """One text of 256 tokens."""
        return {"input_ids": torch.randint(0, 30000, (1, 64 if self.quick else 256), generator=torch.Generator().manual_seed(0))}


def shaped(quick: bool) -> Iterator[Random]:
    """A language model without its head, and an encoder."""
    layers = 2 if quick else 12
    sizes = {"hidden_size": 768, "num_hidden_layers": layers, "num_attention_heads": 12}
    torch.manual_seed(0)
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=32000, intermediate_size=2048, num_key_value_heads=12, use_cache=False, attn_implementation="sdpa", **sizes
        )
    ).eval()
    own = [m for layer in llama.layers for m in (layer.input_layernorm, layer.self_attn)]
    yield Random("llama-shaped, random", llama, layers, quick, own)
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=30522, intermediate_size=3072, attn_implementation="sdpa", **sizes)
    ).eval()
    yield Random("bert-shaped, random", bert, layers, quick, [layer.attention for layer in bert.encoder.layer])


def rows_of(given: Random, kept: Kept) -> Iterator[Shrunk]:
    """One strength of each method, timed."""
    print(f"{given.name}: trace and export", flush=True)
    host = FxHost.from_captured(capture(Hidden(given.model).eval(), given.inputs))
    exported = onnx_of(host)
    seen, twin_seen = (Evidence(h, Calibration.of(h.graph, [given.inputs]), sites=Grouping(h).sites) for h in (host, exported))
    wanted = f"{max(1, given.layers // 4)} of {given.layers}"
    for rewrite in REWRITES:
        ours, theirs = (offered(rewrite.name, rewrite, h, e) for h, e in ((host, seen), (exported, twin_seen)))
        for kind in [k for k in ours if k.strength == wanted or rewrite.per == "block"]:
            if kept.found(given.name, kind.method, kind.strength):
                continue
            print(f"{given.name}: {kind.method}, {kind.strength}", flush=True)
            made, seconds = applied(host, kind), 0.5 if given.quick else 4.0
            twin = next((k for k in theirs if k.strength == kind.strength), None)
            times = (
                ratio(host, made.host, given.inputs, seconds),
                None if twin is None else ratio(exported, applied(exported, twin).host, given.inputs, seconds),
            )
            sizes = made.parameters, made.cache_bytes
            yield Shrunk(given.name, kind.method, kind.strength, None, None, made.weights, made.cache, *times, "", *sizes)


def expected(given: Random, rows: list[Shrunk]) -> list[str]:
    """What removing a quarter of the attention layers gave, beside what their share of the time predicts."""
    row = next((r for r in rows if r.model == given.name and r.method == "gate-norm" and r.torch is not None), None)
    if row is None:
        return []
    share = attention_share(given)
    part = int(row.strength.split()[0]) / given.layers
    measured = " and ".join(f"{1 / t:.2f} times ({name})" for name, t in (("torch", row.torch), ("onnxruntime", row.onnx)) if t)
    return [
        f"{given.name}: without {part:.0%} of attention layers {measured} the throughput; attention with its norm takes {share:.0%} of a "
        f"call in torch, which predicts {1 / (1 - share * part):.2f} times"
    ]


def attention_share(given: Random) -> float:
    """Of a call of the untouched torch model: median over rounds, by the clock around its modules."""
    spent, started = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def end(*_: object) -> None:
        nonlocal spent
        spent += time.perf_counter() - started

    hooks = [h for m in given.attention for h in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))]
    shares = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            spent, before = 0.0, time.perf_counter()
            given.model(**given.inputs)
            shares.append(spent / (time.perf_counter() - before))
    for hook in hooks:
        hook.remove()
    return sorted(shares[1:])[len(shares[1:]) // 2]
