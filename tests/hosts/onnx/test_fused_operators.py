"""Attentions that another tool fused mean, node by node, what onnxruntime computes; and they can be written anew."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from canonical import check, values_in_host
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import attnopt
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

SIZES = {"batch": 2, "length": 5, "past": 3, "keys": 7, "past + length": 8}
B, L, P, K, T = SIZES
KINDS = {
    **dict.fromkeys(("i32", "count"), (TensorProto.INT32, np.int32)),
    "i64": (TensorProto.INT64, np.int64),
    "bool": (TensorProto.BOOL, np.bool_),
}
RNG = np.random.default_rng(0)


def f(*shape):
    return ("f32", shape)


def mask(*shape):
    return ("i32", shape)


def constant(array):
    return np.asarray(array)


def weights(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 0.3


def number(kind, array):
    return np.asarray(array, dtype=KINDS[kind][1])


HEADS, WIDE = {"num_heads": 4}, 32
STATES, WEIGHT, SHIFT = f(B, L, 16), weights(16, 3 * WIDE), weights(3 * WIDE)
FLAT = (f(B, L, WIDE), f(B, K, WIDE), f(B, K, WIDE))
SELF = (f(B, L, WIDE), f(B, L, WIDE), f(B, L, WIDE))
PAST = (f(B, 4, P, 8), f(B, 4, P, 8))
GROUPED = {"num_heads": 4, "kv_num_heads": 2}
NARROW = (f(B, L, WIDE), f(B, L, 16), f(B, L, 16))
TABLES, WIDER = (weights(16, 8), weights(16, 8)), (f(B, L, 64), f(B, L, 32), f(B, L, 32))
LAST, ALL = number("i32", [4, 4]), number("i32", 5)

# name: (operator, inputs (None: absent; arrays: constants), outputs, attributes)
MICROSOFT = {
    "attention": ("Attention", [STATES, WEIGHT, SHIFT], 1, HEADS),
    "attention_without_bias": ("Attention", [STATES, WEIGHT, None], 1, {**HEADS, "scale": 0.5}),
    "attention_mask": ("Attention", [STATES, WEIGHT, SHIFT, mask(B, L)], 1, HEADS),
    "attention_lengths": ("Attention", [STATES, WEIGHT, SHIFT, ("count", (B,))], 1, {**HEADS, "mask_filter_value": -50.0}),
    "attention_mask_per_query": ("Attention", [STATES, WEIGHT, SHIFT, mask(B, L, L)], 1, {**HEADS, "unidirectional": 1}),
    "attention_causal_mask": ("Attention", [STATES, WEIGHT, SHIFT, mask(B, L)], 1, {**HEADS, "unidirectional": 1}),
    "attention_bias": ("Attention", [STATES, WEIGHT, SHIFT, mask(B, L), None, f(B, 4, L, L)], 1, HEADS),
    "attention_past": ("Attention", [STATES, WEIGHT, SHIFT, mask(B, T), f(2, B, 4, P, 8)], 2, {**HEADS, "unidirectional": 1}),
    "attention_widths": (
        "Attention",
        [STATES, weights(16, 32 + 32 + 16), weights(80)],
        1,
        {**HEADS, "qkv_hidden_sizes": [32, 32, 16]},
    ),
    "mha": ("MultiHeadAttention", [*FLAT], 1, HEADS),
    "mha_bias": ("MultiHeadAttention", [*FLAT, SHIFT], 1, HEADS),
    "mha_padding": ("MultiHeadAttention", [*FLAT, None, mask(B, K)], 1, HEADS),
    "mha_added": ("MultiHeadAttention", [*FLAT, None, None, f(1, 4, L, K)], 1, {**HEADS, "scale": 0.2}),
    "mha_causal": ("MultiHeadAttention", [*SELF, None, mask(B, L), f(1, 1, L, L)], 1, {**HEADS, "unidirectional": 1}),
    "mha_past": ("MultiHeadAttention", [*SELF, None, mask(B, T), None, *PAST], 3, HEADS),
    "mha_causal_past": ("MultiHeadAttention", [*SELF, None, None, None, *PAST], 3, {**HEADS, "unidirectional": 1}),
    "mha_heads_apart": ("MultiHeadAttention", [f(B, L, WIDE), f(B, 4, K, 8), f(B, 4, K, 8)], 1, HEADS),
    "gqa": ("GroupQueryAttention", [*NARROW, None, None, LAST, ALL], 1, GROUPED),
    "gqa_window": (
        "GroupQueryAttention",
        [*NARROW, None, None, LAST, ALL],
        1,
        {**GROUPED, "local_window_size": 2, "softcap": 3.0},
    ),
    "gqa_bias": ("GroupQueryAttention", [*NARROW, None, None, LAST, ALL, None, None, None, f(1, 1, L, L)], 1, GROUPED),
    "gqa_padded": ("GroupQueryAttention", [*NARROW, None, None, ("count", (B,)), ALL], 1, GROUPED),
    "gqa_packed": ("GroupQueryAttention", [f(B, L, WIDE + 32), None, None, None, None, LAST, ALL], 1, GROUPED),
    "gqa_rotary": ("GroupQueryAttention", [*WIDER, None, None, LAST, ALL, *TABLES], 3, {**GROUPED, "do_rotary": 1}),
    "gqa_rotary_positions": (
        "GroupQueryAttention",
        [*WIDER, None, None, LAST, ALL, *TABLES, number("i64", [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])],
        3,
        {**GROUPED, "do_rotary": 1, "rotary_interleaved": 1},
    ),
    "gqa_past_positions": (
        "GroupQueryAttention",
        [
            f(2, 1, 64),
            f(2, 1, 32),
            f(2, 1, 32),
            f(2, 2, 3, 16),
            f(2, 2, 3, 16),
            number("i32", [3, 3]),
            number("i32", 4),
            *TABLES,
            number("i64", [[7], [2]]),
        ],
        3,
        {**GROUPED, "do_rotary": 1},
    ),
    "gqa_past": (
        "GroupQueryAttention",
        [f(1, 5, 64), f(1, 5, 32), f(1, 5, 32), f(1, 2, 3, 16), f(1, 2, 3, 16), number("i32", [7]), number("i32", 8), *TABLES],
        3,
        {**GROUPED, "do_rotary": 1, "local_window_size": 3},
    ),
    "rotary": ("RotaryEmbedding", [f(B, 4, L, 16), number("i64", [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]), *TABLES], 1, {}),
    "rotary_in_a_row": (
        "RotaryEmbedding",
        [f(B, L, WIDE), number("i64", [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]), *TABLES],
        1,
        {"interleaved": 1},
    ),
    "skip_norm": ("SkipLayerNormalization", [f(B, L, 16), f(B, L, 16), weights(16), weights(16), weights(16)], 4, {}),
    "skip_rms_norm": ("SkipSimplifiedLayerNormalization", [f(B, L, 16), f(B, L, 16), weights(16)], 4, {}),
    "fused_matmul": ("FusedMatMul", [f(B, 4, L, 8), f(B, 4, K, 8)], 1, {"transB": 1, "alpha": 0.25}),
    "bias_gelu": ("BiasGelu", [f(B, L, 16), weights(16)], 1, {}),
    "fast_gelu": ("FastGelu", [f(B, L, 16), weights(16)], 1, {}),
    "quick_gelu": ("QuickGelu", [f(B, L, 16)], 1, {}),
}
APART = (f(B, 4, L, 8), f(B, 2, L, 8), f(B, 2, L, 8))
STANDARD = {
    "past": (24, [*APART, None, f(B, 2, P, 8), f(B, 2, P, 8)], 3, {"is_causal": 1}),
    "past_and_mask": (24, [*APART, f(B, 1, L, T), f(B, 2, P, 8), f(B, 2, P, 8)], 3, {"is_causal": 1}),
    "past_in_a_row": (
        23,
        [f(B, L, 32), f(B, L, 16), f(B, L, 16), ("bool", (1, 1, L, T)), f(B, 2, P, 8), f(B, 2, P, 8)],
        3,
        {"q_num_heads": 4, "kv_num_heads": 2},
    ),
    "key_lengths": (24, [*APART, None, None, None, number("i64", [3, 5])], 1, {}),
}
# What onnxruntime's kernels do not compute yet, against ONNX's own reference.
REFERENCE = {
    "window_to_the_left": (25, [*APART], 1, {"left_window_size": 2}),
    "window_to_both_sides": (25, [*APART, f(B, 1, L, L)], 1, {"left_window_size": 1, "right_window_size": 2}),
    "causal_window_over_a_past": (25, [*APART, None, *STANDARD["past"][1][4:]], 3, {"is_causal": 1, "left_window_size": 3}),
    "causal_key_lengths": (24, [*APART, None, None, None, number("i64", [5, 5])], 1, {"is_causal": 1}),
    "window_of_key_lengths": (
        25,
        [f(B, 4, 2, 8), *APART[1:], None, None, None, number("i64", [3, 5])],
        1,
        {"left_window_size": 1},
    ),
}


def model_of(op, inputs, outputs, attrs, opset=21, domain="com.microsoft"):
    """One operator; inputs are (kind, shape with symbols), or arrays that become initializers, or None."""
    names, declared, held = [], [], {}
    for i, given in enumerate(inputs):
        names.append(f"x{i}" if given is not None else "")
        if isinstance(given, np.ndarray):
            held[names[-1]] = given
        elif given is not None:
            kind, shape = given
            declared.append(value(names[-1], shape, KINDS[kind][0] if kind in KINDS else TensorProto.FLOAT))
    made = [f"y{i}" if i in (0, outputs - 1) or outputs == 3 else "" for i in range(outputs)]
    node = helper.make_node(op, names, made, name="it", domain=domain, **attrs)
    model = small_models.model([node], declared, [m for m in made if m], held, opset)
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def feed(inputs, sizes=SIZES):
    """Random tensors for the inputs that are no constants; the last rows of masks are padded."""
    made = {}
    for i, given in enumerate(inputs):
        if given is None or isinstance(given, np.ndarray):
            continue
        kind, shape = given
        shape = [sizes.get(d, d) for d in shape]
        if kind == "count":
            array = np.arange(2, 2 + shape[0], dtype=np.int32)
        elif kind in KINDS:
            array = np.ones(shape, dtype=KINDS[kind][1])
            array[-1, ..., -2:] = 0
        else:
            array = RNG.standard_normal(shape).astype(np.float32)
        made[f"x{i}"] = torch.from_numpy(array)
    return made


CASES = {
    **{name: (model_of(op, x, n, a), x) for name, (op, x, n, a) in MICROSOFT.items()},
    **{name: (model_of("Attention", x, n, a, opset, ""), x) for name, (opset, x, n, a) in STANDARD.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_means_what_onnxruntime_computes(name):
    model, inputs = CASES[name]
    host = OnnxHost.from_model(model)
    assert not list(host.graph.of("opaque"))
    values = [*host.graph.inputs, *values_in_host(host.graph)]
    compared = check(host.graph, dict(zip(values, host.tap(values, feed(inputs)), strict=True)))
    assert compared == len(model.graph.output)


@pytest.mark.parametrize("name", REFERENCE)
def test_means_what_onnx_defines(name):
    opset, inputs, outputs, attrs = REFERENCE[name]
    model = model_of("Attention", inputs, outputs, attrs, opset, "")
    given = feed(inputs)
    names = [o.name for o in model.graph.output]
    wanted = ReferenceEvaluator(model).run(None, {n: t.numpy() for n, t in given.items()})
    graph = OnnxHost.from_model(model).graph
    held = {v: {**given, **dict(zip(names, map(torch.from_numpy, wanted), strict=True))}[v.name] for v in
            [*graph.inputs, *values_in_host(graph)]}  # fmt: skip
    assert check(graph, held) == len(names)
    assert len(recognise(graph).sites) == 1


REFUSED = {
    "sinks": ("GroupQueryAttention", [*NARROW, None, None, LAST, ALL, *[None] * 4, weights(4)], "its softmax has sinks"),
    "own_lengths": (
        "GroupQueryAttention",
        [*NARROW, f(B, 2, P, 8), f(B, 2, P, 8), ("count", (B,)), ALL],
        "the length of its past may differ from row to row: seqlens_k is data",
    ),
    "shared_buffer": (
        "GroupQueryAttention",
        [f(1, 2, WIDE), f(1, 2, 16), f(1, 2, 16), f(1, 2, 9, 8), f(1, 2, 9, 8), number("i32", [5]), number("i32", 6)],
        "its past and present share one buffer: 9 past and 2 new keys, 6 in all",
    ),
    "paged": ("PagedAttention", [f(B, WIDE)] * 8, "its keys lie in pages of a table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_says_why(name):
    op, inputs, reason = REFUSED[name]
    model = model_of(op, inputs, 1, GROUPED)
    found = recognise(OnnxHost.from_model(model).graph)
    assert not found.sites
    assert [str(r) for r in found.refusals] == [f"com.microsoft::{op}: {reason} (at it)"]
    assert [r.reason for r in attnopt.inspect(model, feed(inputs)).refusals] == [r.reason for r in found.refusals]


@pytest.mark.parametrize("count", [3, 2])
def test_queries_keys_and_values_in_one_tensor(count):
    """[B, L, H, 3, D], or queries beside [B, L, H, 2, D]; only kernels for GPUs compute it, so torch says what is right."""
    packed = f(B, L, 4, count, 8)
    inputs = [packed] if count == 3 else [f(B, L, WIDE), packed]
    model = model_of("MultiHeadAttention", inputs, 1, HEADS)
    given = feed(inputs)
    *first, whole = given.values()
    q, k, v = [*(x.reshape(2, 5, 4, 8) for x in first), *whole.unbind(3)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    graph = OnnxHost.from_model(model).graph
    held = {**dict(zip(graph.inputs, given.values(), strict=True)), graph.outputs[0]: wanted.transpose(1, 2).flatten(2)}
    assert check(graph, held) == 1


@pytest.mark.parametrize("name", [n for n, (m, _) in CASES.items() if "Attention" in m.graph.node[0].op_type])
def test_written_anew_nothing_of_the_old_node_is_left(name):
    model, inputs = CASES[name]
    given = feed(inputs)
    fast = attnopt.optimize(model, given, select="always")
    assert len(fast.report.sites) == 1, fast.report
    wanted = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {n: t.numpy() for n, t in given.items()})
    for a, b in zip(wanted, fast(given), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4, rtol=1e-4)
    if fast.report.fused:
        assert "it" not in [n.name for n in fast._host.model.graph]
