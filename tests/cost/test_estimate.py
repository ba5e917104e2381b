"""Estimates against rooflines by hand, and what must hold of any."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_target import SHAPE, TOY, with_shares

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.estimate import NOTHING, estimate, estimate_linear, estimate_pass, spoken
from attnopt.cost.kernels import KERNELS
from attnopt.cost.target import Target, load_target

H200 = load_target("h200")[0]
DECODE = {"b": 1, "h": 32, "g": 8, "q": 1, "k": 32768, "d": 128, "e": 128}


def test_a_fused_kernel_by_hand():
    # Tiles of 128 queries: 2 heads x 2 tiles on 4 units, 256 keys each; softmax takes 5 operations, the scale 1.
    made = estimate("softmax scale(0.125)", SHAPE, kernel="sdpa", target=TOY)
    pairs = 2 * 256 * 256
    assert made.flops == pairs * (2 * 128 + 6)
    assert made.seconds == pytest.approx(1e-6 + made.flops / 1e9)
    once = 4 * (2 * 256 * 128 + 256 * 128)  # queries and outputs of two heads, keys and values of one
    assert made.bytes == once + 4 * (2 * 2 - 1) * 256 * 128  # each tile of each head reads keys and values; once is counted
    assert made.working_set == once
    assert (made.bound, made.why) == ("products", "bound by products: 33.6 MFLOP at 1 GFLOP/s (float32)")


def test_causal_tiles_above_the_diagonal_are_not_computed():
    whole = estimate("softmax", SHAPE, kernel="sdpa", target=TOY)
    assert estimate("softmax causal", SHAPE, kernel="sdpa", target=TOY).flops == whole.flops * 3 / 4


def test_a_mask_that_is_read_hides_nothing_from_the_products():
    line = "softmax scale(0.125) causal & window(16)"
    read, skipped = (estimate(line, SHAPE, kernel=kernel, target=TOY) for kernel in ("sdpa", "flex"))
    assert read.flops > estimate("softmax scale(0.125)", SHAPE, kernel="sdpa", target=TOY).flops
    assert skipped.seconds < read.seconds
    held = estimate(line, SHAPE, kernel="sdpa", target=TOY, held_mask=True)
    assert held.seconds < read.seconds  # nothing to make
    assert held.flops == 2 * 256 * 256 * (2 * 128 + 7)  # one operation more for each score


def test_spelled_out_writes_and_reads_the_scores():
    made = estimate("softmax scale(0.125)", SHAPE, kernel="eager", target=TOY)
    matrix = 4 * 2 * 256 * 256
    assert made.bytes == 6 * matrix + 4 * 4 * 2 * 256 * 64 + 4 * 3 * 256 * 128
    # product, scale, softmax, product, and keys and values repeated for the second head: all are bound by memory but the products
    products = 2 * (2 * 2 * 256 * 256 * 64) / 1e9
    moved = (4 * matrix + 4 * 3 * 256 * 128) / 1e9
    assert made.seconds == pytest.approx(8e-6 + products + moved)


def test_decoding_is_bound_by_the_cache_of_keys():
    made = estimate("softmax scale(0.0884)", DECODE, "bfloat16", "sdpa", target=H200)
    held = 2 * 8 * 32768 * 256
    assert made.bound == "memory"
    assert made.bytes == held + 2 * 32 * 256
    assert made.seconds == pytest.approx(4e-6 + made.bytes / (0.8 * 4.8e12))
    assert made.why == "bound by memory: 134 MB of attention at 3.84 TB/s"
    short = {**DECODE, "k": 8192}
    inside = estimate("softmax", short, "bfloat16", "sdpa", target=H200)
    outside = estimate("softmax", short, "bfloat16", "sdpa", target=H200, surrounding=1e9)
    assert inside.seconds < outside.seconds  # the rest of the model pushes keys and values out of the cache
    assert "the caches" in inside.why


def test_narrow_keys_move_less_and_are_converted():
    plain = estimate("softmax", DECODE, "bfloat16", "sdpa", target=H200)
    narrow = estimate("softmax cache(k=int8, v=int8)", DECODE, "bfloat16", "sdpa", target=H200)
    assert narrow.bytes < 0.51 * plain.bytes
    assert narrow.flops == plain.flops + 32 * 32768 * 2 * 256  # each stored number: widened, scaled
    assert narrow.seconds < plain.seconds


def test_rounded_products_run_at_their_own_peaks():
    """8 query heads on one key head, 4,096 positions: each narrower product shortens the call."""
    shape = {**DECODE, "q": 4096, "k": 4096}

    def timed(precision, target=H200):
        return estimate(f"softmax {precision}".strip(), shape, "bfloat16", "triton-prefill", target=target)

    plain, scores = timed(""), timed("precision(q=int8, k=int8, p=fp16, v=fp16)")
    both = timed("precision(q=int8, k=int8, p=fp8, v=fp8, v_axis=channel)")
    assert plain.seconds > scores.seconds > both.seconds > 0.4 * plain.seconds
    assert "(int8 and float16)" in scores.why or scores.bound != "products"
    numbers = (32 + 2 * 8) * 4096 * 128  # of q, k and v, four operations on each; two on each score
    assert scores.flops - plain.flops == pytest.approx(2 * 32 * 4096 * 4096 + 4 * numbers)


def test_added_attentions_and_states():
    both = estimate("softmax window(8) plus(1.0, softmax)", SHAPE, kernel="summed-flex", target=TOY)
    first, second = (estimate(s, SHAPE, kernel="flex", target=TOY) for s in ("softmax window(8)", "softmax"))
    assert both.seconds == pytest.approx(first.seconds + second.seconds)
    assert both.flops == first.flops + second.flops
    longer = {**SHAPE, "q": 2560, "k": 2560}
    state = estimate("linear(elu1)", longer, target=TOY).flops / estimate("linear(elu1)", SHAPE, target=TOY).flops
    assert state == pytest.approx(10)


def test_a_linear_layer_by_hand():
    made = estimate_linear(512, 64, 32, target=TOY)
    assert made.flops == 2 * 512 * 64 * 32
    assert made.bytes == 4 * (512 * 64 + 512 * 32 + 64 * 32)
    assert made.seconds == pytest.approx(1e-6 + made.flops / 1e9)
    narrow = estimate_linear(512, 64, 32, weights="int8", target=TOY)
    product = (2 * 512 * 64 * 32) / 4e9 + 2 * 512 * 32 / 1e9
    inputs = max(4 * 512 * 64 / 1e9, 2 * 4 * 512 * 64 / 1e9)
    assert narrow.seconds == pytest.approx(2e-6 + product + inputs)
    one = estimate_linear(1, 4096, 4096, "bfloat16", "int4", target=H200)
    assert one.bytes == pytest.approx(4096 * 4096 / 2 + 2 * 3 * 4096 + 2 * 4096)


def test_a_pass_by_hand():
    assert estimate_pass(1e6, operands=2, target=TOY).seconds == pytest.approx(1e-6 + 3 * 4e6 / 1e9)


def test_sums_and_words():
    a, b = estimate_pass(1e6, target=TOY), estimate_pass(10, target=TOY)
    assert (a + b).seconds == a.seconds + b.seconds
    assert (a + b).why == a.why
    assert b.why == "bound by launches: 1 of 1 us"
    assert (NOTHING + a) == a
    assert (a * 0.5).seconds == a.seconds / 2
    assert [spoken(x, "B") for x in (64e6, 1.5e12, 12)] == ["64 MB", "1.5 TB", "12 B"]


def test_an_unknown_kernel_is_priced_as_nodes():
    assert estimate("softmax", SHAPE, kernel="no-such", target=TOY) == estimate("softmax", SHAPE, kernel="eager", target=TOY)


FUSED = st.sampled_from(["sdpa", "flex", "triton"])
SIZES = st.fixed_dictionaries(
    {"b": st.integers(1, 3), "h": st.sampled_from([4, 8]), "g": st.sampled_from([1, 2, 4]), "q": st.integers(1, 700),
     "k": st.just(0), "d": st.sampled_from([32, 64]), "e": st.sampled_from([32, 64])}
)  # fmt: skip


@given(shape=SIZES, kernel=st.sampled_from(sorted(KERNELS)), w=st.integers(1, 600), more=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_more_visible_keys_are_never_cheaper(shape, kernel, w, more):
    shape = {**shape, "k": shape["q"]}
    if kernel.startswith("local"):  # another window is another cut of chunks, larger or smaller
        w = more = 64
    narrow, wide = (estimate(f"softmax causal & window({n})", shape, kernel=kernel, target=H200) for n in (w, w + more))
    assert narrow.seconds <= wide.seconds * (1 + 1e-12)


@given(shape=SIZES, kernel=st.sampled_from(sorted(KERNELS)), longer=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_more_keys_are_never_cheaper(shape, kernel, longer):
    if kernel.startswith("local"):
        return
    few, many = ({**shape, "k": shape["q"] + extra} for extra in (0, longer))
    for target in (H200, replace(TOY, kind="cpu")):
        fewer, more = (estimate("softmax", shape, kernel=kernel, target=target).seconds for shape in (few, many))
        assert fewer <= more * (1 + 1e-12)


@given(shape=SIZES, kernel=st.sampled_from(sorted(KERNELS)), factor=st.floats(1, 10))
@settings(max_examples=60, deadline=None)
def test_a_better_machine_is_never_slower(shape, kernel, factor):
    shape = {**shape, "k": shape["q"]}

    def seconds(target):
        return estimate("softmax scale(0.1) causal & window(64)", shape, kernel=kernel, target=target).seconds

    before = seconds(TOY) * (1 + 1e-12)
    faster = replace(TOY, bandwidth=TOY.bandwidth * factor, cache_bandwidth=TOY.cache_bandwidth * factor)
    assert seconds(faster) <= before
    assert seconds(replace(TOY, peak={name: rate * factor for name, rate in TOY.peak.items()})) <= before
    assert seconds(TOY) <= seconds(with_shares(products=0.5, memory=0.5, scores=0.5)) * (1 + 1e-12)


CPUS = {  # as measured: float32 and int8 products of Sapphire Rapids, of Zen 4, and of the first held to AVX2
    "amx": (("vnni", "amx"), {"float32": 0.23, "int8": 1.73}),
    "vnni": (("vnni",), {"float32": 0.105, "int8": 0.444}),
    "avx2": ((), {"float32": 0.209, "int8": 0.175}),
}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", CPUS)
def test_what_layers_of_bytes_gain_is_a_matter_of_instructions(name, runtime):
    """What is shipped, on machines that nobody calibrated: int8 pays with VNNI and AMX, and is no gain without."""
    features, peak = CPUS[name]
    levels = ((2.0**21, 60e9), (2.0**26, 15e9))
    cpu = Target(
        "cpu", "cpu", "a CPU", "made up", units=1, bandwidth=15e9, levels=levels, launch=1e-6, peak=peak, features=features
    )

    def ratio(rows, weights):
        narrow, plain = (estimate_linear(rows, 384, 1536, weights=w, target=cpu, runtime=runtime) for w in (weights, ""))
        return narrow.seconds / plain.seconds

    assert ratio(128, "int8") < 0.7 if features else 0.9 < ratio(128, "int8") < 1.6
    if runtime == "onnxruntime":
        assert ratio(128, "int4 group 32") < 2.0
        assert ratio(1, "int4 group 32") < 0.5


def test_onnxruntime_pays_for_hidden_scores_on_a_cpu():
    shape = {"b": 1, "h": 4, "g": 4, "q": 256, "k": 256, "d": 32, "e": 32}
    slow = replace(TOY, kind="cpu", efficiencies={**TOY.efficiencies, "ort-hidden": Efficiency(scores=0.002)})
    for kernel in ("onnx-attention", "ort-mha", "ort-eager"):
        costs = [
            estimate("softmax causal & window(8)", shape, kernel=kernel, target=t).seconds
            for t in (slow, replace(TOY, kind="cpu"))
        ]
        assert costs[0] > 1.5 * costs[1]
    gqa = [estimate("softmax causal", shape, kernel="ort-gqa", target=t) for t in (slow, replace(TOY, kind="cpu"))]
    assert gqa[0] == gqa[1]  # computes no exponential of what is hidden
    assert estimate("softmax", shape, kernel="ort-mha", target=slow) == estimate(
        "softmax", shape, kernel="ort-mha", target=replace(TOY, kind="cpu")
    )
