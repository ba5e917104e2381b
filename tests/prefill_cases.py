"""The cases of the prefill family: those that every lowering is tried on, and what only this family can do.

Its kernel in Triton's interpreter and its eager twin take the same table.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from lowering_cases import CASES, TOLERANCES, Case, inputs, wanted
from torch import Tensor

MORE = {
    "rest_of_a_row": Case("softmax scale(0.1) causal", heads=(2, 1), width=(80, 96), lengths=(20, 20), batch=2),
    "rest_not_whole": Case("softmax scale(0.1)", heads=(2, 2), width=(72, 40), lengths=(7, 19), batch=1),
    "padded_rows": Case("softmax scale(0.1) k < q", heads=(2, 1), width=(28, 24), lengths=(20, 20), batch=1),
    "rest_of_empty_rows": Case("softmax scale(0.1) k < q", heads=(2, 1), width=(16, 80), lengths=(20, 20), batch=1),
    "widest": Case("softmax scale(0.06) causal", heads=(1, 1), width=(256, 256), lengths=(17, 17), batch=1),
    "wide_and_narrow": Case("softmax scale(0.07)", heads=(2, 1), width=(192, 128), lengths=(9, 20), batch=1),
    "odd_ratio": Case("softmax scale(0.25) causal", heads=(6, 2), lengths=(20, 20), batch=2),
    "bfloat16": Case("softmax scale(0.25) causal", dtype="bfloat16", lengths=(20, 20)),
    "half_bias": Case("softmax scale(0.25) add(load(bias, b, h, row, k)) causal", dtype="float16", lengths=(20, 20)),
    "last_queries": Case("softmax scale(0.25) offset(size(k) - size(q)) causal", lengths=(5, 40)),
    "last_queries_window": Case("softmax scale(0.25) offset(size(k) - size(q)) causal & window(9)", lengths=(20, 60), batch=1),
    "past_and_bias": Case("softmax scale(0.25) add(load(bias, b, h, row, k)) offset(24) causal", lengths=(16, 40), batch=1),
    "sink_per_head": Case("softmax scale(0.25) sink(load(table, 0, h, 0, 0)) causal", heads=(4, 2)),
    "sink_of_empty_rows": Case("softmax scale(0.25) sink(0.5) load(seen, b, 0, 0, k)"),
    "sink_softcap": Case("softmax scale(0.25) softcap(1.5) sink(0.5) causal & window(4)"),
    "negative_scale": Case("softmax scale(-0.25) causal"),
    "blocks": Case("softmax scale(0.25) chunk(12)", lengths=(70, 70), batch=1),
    "causal_blocks": Case("softmax scale(0.25) causal & chunk(24)", lengths=(70, 70), batch=1),
    "block_causal": Case("softmax scale(0.25) (k // 8 <= q // 8)", lengths=(70, 70), batch=1),
    "near_blocks": Case("softmax scale(0.25) near_blocks(8, 1)", lengths=(70, 70), batch=1),
    "dilated_window": Case("softmax scale(0.25) causal & window(40) & dilated(3)", lengths=(70, 70), batch=1),
    "window_and_padding": Case("softmax scale(0.25) causal & window(20) & load(seen, b, 0, 0, k)", lengths=(70, 70), batch=2),
    "global_and_window": Case("softmax scale(0.25) causal & (window(9) | global(20))", lengths=(70, 70), batch=1),
    "global_in_a_block": Case("softmax scale(0.25) causal & (window(20) | global(3))", lengths=(70, 70), batch=1),
    "global_both_sides": Case("softmax scale(0.25) window(5) & lookahead(5) | global(3)", lengths=(70, 70), batch=1),
    "global_queries": Case("softmax scale(0.25) window(5) & lookahead(5) | global_query(3)", lengths=(70, 70), batch=1),
    "windows_joined": Case("softmax scale(0.25) causal & (window(5) | window(30) & dilated(4))", lengths=(70, 70), batch=1),
    "window_of_nothing": Case("softmax scale(0.25) causal & window(0)", lengths=(20, 20), batch=1),
    "beyond_the_keys": Case("softmax scale(0.25) window(4)", lengths=(70, 20), batch=1),
    "last_keys": Case("softmax scale(0.25) causal & last(30)", lengths=(70, 70), batch=1),
    "logarithm": Case("softmax mod(log1p) causal", whole=1, width=(16, 16)),
    "power": Case("softmax scale(0.25) add(pow(2.0, -h) * (k - q)) causal", heads=(4, 2), lengths=(20, 20)),
    "floored": Case("softmax scale(0.25) add(0.1 * ((k - q) // 3) + 0.2 * ((k - q) % 5))", lengths=(20, 20), batch=1),
    "buckets": Case("softmax scale(0.25) add(load(table, 0, h, 0, bucket(3, 1.5)))", lengths=(40, 40), batch=1),
    "causal_buckets": Case("softmax add(load(table, 0, h, 0, causal_bucket(4, 1.2))) add(load(table, 0, h, 0, 0)) causal",
                           lengths=(40, 40), batch=1),
    "chosen": Case("softmax scale(0.25) add(where(h < 2, min(q, k) * 0.1, 0.0)) causal | k % 2 == 0", batch=1),
}  # fmt: skip
REFUSED = ("sigmoid",)
FEW_HEADS = {(4, 4): (2, 2)}  # the interpreter takes its time for each head


def small(case: Case) -> Case:
    return replace(case, batch=min(case.batch, 2), heads=FEW_HEADS.get(case.heads, case.heads))


TABLE = {name: small(case) for name, case in (CASES | MORE).items() if name not in REFUSED}


def tensors(case: Case) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v and the rest."""
    made = dict(inputs(case))
    if case.spec.startswith("softmax mod(log1p)"):  # whose argument may not be below -1
        made["q"], made["k"] = made["q"].abs(), made["k"].abs()
    return [made.pop(name) for name in "qkv"], made


def exact(case: Case) -> Tensor:
    if not case.spec.startswith("softmax mod(log1p)"):
        return wanted(case)
    from attnopt.ir.reference import reference

    (q, k, v), rest = tensors(case)
    return reference(case.spec, q.double(), k.double(), v.double(), **rest)


def tolerance(case: Case) -> float:
    """Of the dtype; scores that are large are rounded to more than that, where no fused multiply-add keeps them exact."""
    (q, k, _), _ = tensors(case)
    largest = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) if case.whole > 1 else 0.0
    return TOLERANCES[case.dtype] + largest * torch.finfo(torch.float32).eps
