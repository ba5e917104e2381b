"""One table of attentions that every lowering is tried on: each must compute what `reference` does, or refuse and say why.

A case is a spec line with shapes. Its site is one attention of the right host, recognised in a small model, whose spec is then
replaced by the case's; `bias` [B, H, Q, K], `table` [1, H, 1, K] and `seen` [B, 1, 1, K] are there for specs to load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from hosts.onnx import small_models
from onnx import TensorProto, helper
from torch import Tensor, nn

from attnopt.codegen.lowering import Lowering
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.layout import Layout, Operand
from attnopt.ir.reference import reference
from attnopt.ir.site import Site
from attnopt.ir.spec import parse
from attnopt.patterns import recognise
from attnopt.plan.choose import emit

BIAS, TABLE, SEEN = "load(bias, b, h, row, k)", "load(table, 0, h, 0, k)", "load(seen, b, 0, 0, k)"
RUNTIMES = {"torch": "torch", "onnx": "onnxruntime"}
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Case:
    """heads: of queries, of keys. width: of q and k, of v. lengths: queries, keys. whole: q and k are whole numbers up to this."""

    spec: str
    heads: tuple[int, int] = (4, 4)
    width: tuple[int, int] = (16, 16)
    lengths: tuple[int, int] = (12, 12)
    dtype: str = "float32"
    whole: int = 0
    batch: int = 3


CASES = {
    "plain": Case("softmax scale(0.25)"),
    "unscaled": Case("softmax"),
    "other_widths": Case("softmax scale(0.2)", width=(24, 32)),
    "narrow": Case("softmax scale(0.5)", width=(5, 3)),
    "causal_other_widths": Case("softmax scale(0.2) causal", width=(24, 32)),
    "causal_narrow": Case("softmax scale(0.2) causal", width=(12, 12)),
    "one_query": Case("softmax scale(0.25)", lengths=(1, 12)),
    "one_by_one": Case("softmax scale(0.25) causal", lengths=(1, 1)),
    "more_queries": Case("softmax scale(0.25)", lengths=(13, 4)),
    "grouped": Case("softmax scale(0.25)", heads=(6, 2)),
    "one_key_head": Case("softmax scale(0.25) causal", heads=(4, 1)),
    "causal": Case("softmax scale(0.25) causal", lengths=(33, 33)),
    "causal_more_keys": Case("softmax scale(0.25) causal", lengths=(5, 12)),
    "causal_more_queries": Case("softmax scale(0.25) causal", lengths=(12, 5)),
    "window": Case("softmax scale(0.25) causal & window(4)", heads=(4, 2), lengths=(140, 140)),
    "window_of_one": Case("softmax scale(0.25) causal & window(1)"),
    "window_of_all": Case("softmax scale(0.25) causal & window(100)"),
    "window_both_sides": Case("softmax scale(0.25) window(3) & lookahead(2)"),
    "window_or_global": Case("softmax scale(0.25) causal & (window(3) | global(2))"),
    "padding": Case(f"softmax scale(0.25) {SEEN} empty(zero)"),
    "padding_mean": Case(f"softmax scale(0.25) {SEEN}"),
    "causal_padding": Case(f"softmax scale(0.25) causal & {SEEN}", heads=(4, 2)),
    "first_row_empty": Case("softmax scale(0.25) (k < q) empty(zero)"),
    "first_row_mean": Case("softmax scale(0.25) (k < q)"),
    "bias": Case(f"softmax scale(0.25) add({BIAS})"),
    "bias_of_a_head": Case(f"softmax scale(0.25) add({TABLE})", heads=(4, 2)),
    "two_biases": Case(f"softmax scale(0.25) add({TABLE}) add({BIAS})"),
    "bias_and_mask": Case(f"softmax scale(0.25) add({BIAS}) causal & {SEEN} empty(zero)"),
    "constant_bias": Case("softmax scale(0.25) add(3.0)"),
    "distances": Case("softmax scale(0.25) add((k - q) * 0.5 * (h + 1)) causal"),
    "softcap": Case("softmax scale(0.25) softcap(1.5)"),
    "softcap_causal": Case("softmax scale(0.25) softcap(1.5) causal", heads=(4, 2)),
    "softcap_window": Case("softmax scale(0.25) softcap(1.5) causal & window(4)"),
    "softcap_bias": Case(f"softmax scale(0.25) softcap(1.5) add({BIAS})"),
    "scale_after": Case("softmax softcap(1.5) scale(2.0)"),
    "squashed": Case("softmax scale(0.25) mod(tanh)"),
    "extreme_logits": Case("softmax", whole=30),
    "extreme_causal": Case("softmax causal", whole=30),
    "extreme_padding": Case(f"softmax {SEEN}", whole=30),
    "extreme_bias": Case("softmax add((k - q) * 100000) causal", whole=30),
    "half": Case("softmax scale(0.25) causal", dtype="float16"),
    "half_padding": Case(f"softmax scale(0.25) causal & {SEEN}", dtype="float16"),
    "tensor_scale": Case("softmax scale(load(table, 0, h, 0, 0))"),
    "sink": Case("softmax scale(0.25) sink(0.5)"),
    "sigmoid": Case("sigmoid scale(0.25)"),
    "length": Case("softmax scale(0.25) (k < size(k) - 1)"),
}  # fmt: skip


# What kernels of scale, then bias under a mask cannot say.
BEYOND_SCALE_AND_BIAS = {
    **{name: f"score terms '{terms}' do not fit scale, then bias" for name, terms in {
        "softcap": "scale(0.25) softcap(1.5)",
        "softcap_causal": "scale(0.25) softcap(1.5)",
        "softcap_window": "scale(0.25) softcap(1.5)",
        "softcap_bias": f"scale(0.25) softcap(1.5) add({BIAS})",
        "scale_after": "softcap(1.5) scale(2.0)",
        "squashed": "scale(0.25) mod(tanh)",
    }.items()},
    "tensor_scale": "the scale is a tensor",
    "sink": "sink is not part of this kernel",
    "sigmoid": "the normaliser is sigmoid, not softmax",
    "length": "size(k) has no node in this graph",
}  # fmt: skip


@lru_cache
def inputs(case: Case) -> dict[str, Tensor]:
    """Random tensors; row 1 of the batch sees no key at all, and the others miss some."""
    generator = torch.Generator().manual_seed(0)
    (h, g), (d, e), (q_len, kv_len) = case.heads, case.width, case.lengths
    shapes = {"q": (case.batch, h, q_len, d), "k": (case.batch, g, kv_len, d), "v": (case.batch, g, kv_len, e),
              "bias": (case.batch, h, q_len, kv_len), "table": (1, h, 1, kv_len)}  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if case.whole:  # products of whole numbers are exact in float32, however large the scores
        for name in "qk":
            made[name] = torch.randint(-case.whole, case.whole + 1, shapes[name], generator=generator).float()
    seen = torch.rand(case.batch, 1, 1, kv_len, generator=generator) < 0.7
    seen[..., 0] = True
    seen[1:2] = False
    return {name: x.to(getattr(torch, case.dtype)) for name, x in made.items()} | {"seen": seen}


@lru_cache
def wanted(case: Case) -> Tensor:
    """The meaning of the spec, in float64."""
    q, k, v, *loaded = (x if x.dtype == torch.bool else x.double() for x in inputs(case).values())
    return reference(case.spec, q, k, v, **dict(zip(("bias", "table", "seen"), loaded, strict=True)))


class Plain(nn.Module):
    """softmax(q k') v; what the case's spec loads stands ready beside it."""

    def forward(self, q, k, v, bias, table, seen):
        ratio = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v


@lru_cache
def torch_host(heads: tuple[int, int], width: tuple[int, int], same_length: bool, dtype: str) -> FxHost:
    traced = inputs(Case("", heads, width, (10, 10) if same_length else (10, 14), dtype))
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    keys = rows if same_length else torch.export.Dim("keys")
    dims = {"q": {0: batch, 2: rows}, "k": {0: batch, 2: keys}, "v": {0: batch, 2: keys}, "bias": {0: batch, 2: rows, 3: keys},
            "table": {3: keys}, "seen": {0: batch, 3: keys}}  # fmt: skip
    return FxHost.from_captured(capture(Plain().eval(), traced, dims))


@lru_cache
def onnx_host(heads: tuple[int, int], width: tuple[int, int], same_length: bool, dtype: str, opset: int) -> OnnxHost:
    (h, g), (d, e), keys, kind = heads, width, "rows" if same_length else "keys", ONNX_TYPES[dtype]
    shapes = {"q": ["batch", h, "rows", d], "k": ["batch", g, keys, d], "v": ["batch", g, keys, e],
              "bias": ["batch", h, "rows", keys], "table": [1, h, 1, keys]}  # fmt: skip
    given = [small_models.value(name, shape, kind) for name, shape in shapes.items()]
    given.append(small_models.value("seen", ["batch", 1, 1, keys], TensorProto.BOOL))
    weights: dict[str, Any] = {"two": np.array([2]), "ratio": np.array([1, 1, h // g, 1, 1])}
    nodes = []
    for name, size in (("k", d), ("v", e)):
        weights[f"{name}_shape"] = np.array([0, h, -1, size])
        nodes += [
            helper.make_node("Unsqueeze", [name, "two"], [f"{name}_apart"], name=f"{name}_apart"),
            helper.make_node("Expand", [f"{name}_apart", "ratio"], [f"{name}_many"], name=f"{name}_many"),
            helper.make_node("Reshape", [f"{name}_many", f"{name}_shape"], [f"{name}_all"], name=f"{name}_all"),
        ]
    nodes += [
        helper.make_node("Transpose", ["k_all"], ["kt"], name="turned", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], name="scores"),
        helper.make_node("Softmax", ["s"], ["p"], name="weights", axis=-1),
        helper.make_node("MatMul", ["p", "v_all"], ["y"], name="output"),
    ]
    model = small_models.model(nodes, given, weights=weights, opset=opset)
    model.graph.output[0].type.tensor_type.elem_type = kind
    return OnnxHost.from_model(model)


def opened(case: Case, host: str, opset: int = 17) -> tuple[FxHost | OnnxHost, Site]:
    """A host that may be changed, and its one site under the case's spec."""
    form = (case.heads, case.width, case.lengths[0] == case.lengths[1], case.dtype)
    trial = torch_host(*form).copy() if host == "torch" else onnx_host(*form, opset).copy()
    (site,) = recognise(trial.graph).sites
    a, values = site.axes, {value.name: value for value in trial.graph.inputs}
    heads = (*a["g"], *a["r"])
    layouts: dict[str, Layout] = {
        "bias": (a["b"], heads, a["q"], a["k"]),
        "table": ((), heads, (), a["k"]),
        "seen": (a["b"], (), (), a["k"]),
    }
    operands = {name: Operand(values[name], layout) for name, layout in layouts.items()}
    return trial, replace(site, operands=operands).with_step("test", parse(case.spec))


def seen_rows(case: Case) -> Tensor:
    """Which rows [B, H, Q] have a visible key."""
    mask, (h, _), (q_len, kv_len) = parse(case.spec).mask, case.heads, case.lengths
    visible = torch.ones(case.batch, h, q_len, kv_len, dtype=torch.bool)
    return (visible & evaluate(mask, Grid(case.batch, h, q_len, kv_len), inputs(case)) if mask is not None else visible).any(-1)


def computed(lowering: Lowering, case: Case) -> Tensor:
    """What the lowering's kernel gives in its host, at sizes that were not traced."""
    trial, site = opened(case, lowering.host, max(lowering.opset, 17))
    emit(trial, site, lowering)
    trial.finish()
    (result,) = trial.runner()(inputs(case))
    return result


def check(lowering: Lowering, case: Case, refused: str = "", runtime: str = "") -> None:
    """The case is computed as `reference` does, or refused for the reason given."""
    _, site = opened(case, lowering.host, max(lowering.opset, 17))
    said = lowering.supports(site, runtime or RUNTIMES[lowering.host])
    assert (said.reason if said else "") == refused
    if said is None:
        result, tolerance = computed(lowering, case).double(), TOLERANCES[case.dtype]
        rows = seen_rows(case)
        torch.testing.assert_close(result[rows], wanted(case)[rows], atol=tolerance, rtol=tolerance)
        if case.dtype != "float16":  # its numbers are too close together for a fill to drown every score
            torch.testing.assert_close(result, wanted(case), atol=tolerance, rtol=tolerance)
