"""The cases of the decode family: few queries, long caches, in every form in which a cache is stored.

Kernels in Triton's interpreter, their eager twin and any other backend take the same table. A case is a spec line with shapes; its
`cache` clause says how keys and values are stored, `tokens` how many of each sequence count. `bias`, `table` and `seen` are there for
specs to load, as in lowering_cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from lowering_cases import TOLERANCES, Case, inputs
from torch import Tensor

from attnopt.ir.kv_cache import Cache, attend_cache, in_pages, pack_cache
from attnopt.ir.reference import Attended
from attnopt.ir.spec import parse

LAST = "offset(size(k) - size(q))"
PAGED = "layout=paged, page={}"


@dataclass(frozen=True)
class DecodeCase(Case):
    """tokens: how many of each sequence count; None is all of them. value_heads: where they are not as many as key heads."""

    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (1, 70)
    batch: int = 1
    tokens: tuple[int, ...] | None = None
    value_heads: int = 0


def cached(line: str, rest: str = "", **shape: object) -> DecodeCase:
    return DecodeCase(f"softmax scale(0.25) {rest} cache({line})", **shape)  # type: ignore[arg-type]


TABLE = {
    "plain": DecodeCase("softmax scale(0.25)"),
    "many_rows": DecodeCase(f"softmax scale(0.25) {LAST} causal", heads=(6, 1), lengths=(7, 40)),
    "value_heads": DecodeCase("softmax scale(0.25)", heads=(6, 3), value_heads=2, lengths=(2, 40)),
    "half": DecodeCase("softmax scale(0.25)", dtype="float16"),
    "bfloat16": DecodeCase(f"softmax scale(0.25) {LAST} causal", dtype="bfloat16", lengths=(2, 40)),
    "narrow": DecodeCase("softmax scale(0.1)", heads=(2, 1), width=(20, 12), lengths=(1, 40)),
    "widest": DecodeCase("softmax scale(0.06)", heads=(2, 1), width=(256, 192), lengths=(1, 40)),
    "window_and_global": DecodeCase(f"softmax scale(0.25) {LAST} causal & (window(9) | global(40))", lengths=(2, 160)),
    "dilated": DecodeCase(f"softmax scale(0.25) {LAST} causal & window(60) & dilated(3)", lengths=(2, 100)),
    "padding_mean": DecodeCase("softmax scale(0.25) load(seen, b, 0, 0, k)", batch=2),
    "padding_mean_int4": cached("k=int4, v=int4, group=16", "load(seen, b, 0, 0, k)", batch=2, width=(32, 32)),
    "int2": cached("k=int2, v=int2", width=(64, 32)),
    "int2_groups": cached("k=int2, v=int2, group=32, scales=fp16", width=(128, 64), dtype="float16", heads=(2, 1)),
    "int2_by_channel": cached("k=int2, v=int2, k_axis=channel, group=32, levels=symmetric", width=(64, 64), lengths=(2, 70)),
    "int2_pages": cached(f"k=int2, v=int8, {PAGED.format(16)}", dtype="bfloat16", width=(64, 32), batch=2, tokens=(70, 21)),
    "int4_shares_cross_groups": cached("k=int4, v=int4, group=32", width=(96, 96), heads=(2, 1), lengths=(1, 40)),
    "int4_groups_cross_shares": cached("k=int4, v=int4, group=48", width=(64, 64), heads=(2, 1), lengths=(1, 40)),
    "nothing_seen": DecodeCase("softmax scale(0.25) k < q"),
    "bias": DecodeCase(f"softmax scale(0.25) add(load(bias, b, h, row, k)) {LAST} causal", lengths=(2, 40), batch=2),
    "softcap_sink": DecodeCase(f"softmax scale(0.25) softcap(1.5) sink(load(table, 0, h, 0, 0)) {LAST} causal & window(40)", batch=2),
    "sink_of_nothing": DecodeCase("softmax scale(0.25) sink(0.5) load(seen, b, 0, 0, k)", batch=2),
    "extreme": DecodeCase("softmax", whole=30),
    "own_lengths": DecodeCase(f"softmax scale(0.25) {LAST} causal & window(30)", lengths=(2, 80), batch=3, tokens=(80, 33, 5)),
    "no_tokens": DecodeCase("softmax scale(0.25)", batch=2, tokens=(0, 40)),
    "own_lengths_mean": DecodeCase("softmax scale(0.25) (load(seen, b, 0, 0, k) & k > 50)", batch=2, tokens=(70, 40)),
    "pages": cached(PAGED.format(16), batch=2, tokens=(70, 21)),
    "odd_pages": cached(PAGED.format(12), f"{LAST} causal & window(30)", lengths=(2, 84), batch=2, tokens=(84, 50)),
    "int8": cached("k=int8, v=int8"),
    "int8_symmetric": cached("k=int8, v=int8, levels=symmetric", dtype="float16"),
    "int8_groups": cached("k=int8, v=int8, group=16, scales=fp16", width=(48, 40)),
    "int8_pages": cached(f"k=int8, v=int8, {PAGED.format(16)}", batch=2, tokens=(70, 21), dtype="bfloat16"),
    "int8_channel_pages": cached(f"k=int8, v=int8, k_axis=channel, v_axis=channel, {PAGED.format(32)}", batch=2, tokens=(70, 21)),
    "int4": cached("k=int4, v=int4", dtype="float16"),
    "int4_narrow": cached("k=int4, v=int4", width=(20, 12)),
    "int4_groups": cached("k=int4, v=int4, group=32, scales=bf16", width=(64, 64), dtype="bfloat16"),
    "int4_symmetric": cached("k=int4, v=int4, group=16, levels=symmetric", width=(32, 64)),
    "kivi": cached(f"k=int4, v=int4, k_axis=channel, group=16, {PAGED.format(16)}", width=(32, 32), batch=2, tokens=(70, 33)),
    "int4_blocks_half": cached("k=int4, v=int4, k_axis=channel, v_axis=channel, group=32, levels=symmetric", dtype="float16"),
    "fp8": cached("k=fp8, v=fp8"),
    "fp8_half": cached("k=fp8, v=fp8, group=16", width=(32, 32), dtype="float16"),
    "fp8_channels": cached("k=fp8, v=fp8, k_axis=channel, v_axis=channel, scales=fp16", dtype="bfloat16"),
    "mixed": cached("k=int8, v=int4, k_axis=channel", "softcap(2.0)", width=(32, 48)),
}  # fmt: skip


@lru_cache
def tensors(case: DecodeCase) -> tuple[Tensor, Cache, dict[str, Tensor]]:
    """q, the cache and the rest."""
    made = dict(inputs(replace(case, value_heads=0)))
    q, k, v = (made.pop(name) for name in "qkv")
    if case.value_heads:
        v = v[:, : case.value_heads]
    clause, lengths = parse(case.spec).cache, None if case.tokens is None else torch.tensor(case.tokens, dtype=torch.int32)
    cache = pack_cache(case.spec, k, v, lengths)
    if clause is None or clause.word("layout") != "paged":
        return q, cache, made
    count = -(-k.shape[2] // clause.count("page"))
    order = torch.randperm(case.batch * count + 2, generator=torch.Generator().manual_seed(0))
    return q, in_pages(cache, case.spec, order[: case.batch * count].view(case.batch, count).int(), case.batch * count + 2), made


@lru_cache
def exact(case: DecodeCase) -> Attended:
    """The meaning of the spec on what the cache stands for, in float64."""
    q, cache, rest = tensors(case)
    return attend_cache(
        case.spec, q.double(), cache, **{name: x if x.dtype == torch.bool else x.double() for name, x in rest.items()}
    )


def tolerance(case: DecodeCase) -> float:
    """Of the dtype; scores that are large are rounded to more than that."""
    return TOLERANCES[case.dtype] * (10 if case.whole > 1 else 1)
