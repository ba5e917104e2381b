"""Rounded products in the prefill family: what is refused, what the emitted file holds, and what the compiler makes of it."""

from __future__ import annotations

import re

import pytest
from precision_cases import FP8, GROUPS, INT8, SAGE

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.compile import Compiled, built, compile_for
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.low_precision import block_of, fitted, pieces_of
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

LINE = f"softmax scale(0.125) causal {SAGE}"
PRODUCTS = {
    "sm_89": (r"mma\.sync\S*\.s32\.s8\.s8\.s32", r"mma\.sync\S*\.f32\.e4m3\.e4m3\.f32"),
    "sm_90": (r"wgmma\.mma_async\S*\.s32\.s8\.s8", r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3"),
    "sm_100": (r"mma\.sync\S*\.s32\.s8\.s8\.s32", r"tcgen05\.mma\S*kind::f8f6f4"),
}
TILE = Tile(128, 64, 8, 2)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("architecture", PRODUCTS)
def test_products_of_eight_bits_are_those_of_tensor_cores(architecture, width):
    made = compile_for(parse(LINE), Form(width, width, "bfloat16"), architecture, TILE)
    assert isinstance(made, Compiled)
    assert made.refusal() is None
    assert (made.spills, made.registers <= 255) == (0, True)
    assert all(re.search(product, made.assembly) for product in PRODUCTS[architecture])
    assert "cvt.rn.satfinite.e4m3x2" in made.assembly
    assert not re.search(r"mma\S*\.(bf16|f16\.f16)", made.assembly)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_integers_beside_half_precision(architecture):
    made = compile_for(parse(LINE.replace("fp8", "fp16")), Form(64, 64, "bfloat16"), architecture, Tile(128, 64, 4, 2))
    assert isinstance(made, Compiled)
    assert (made.spills, "s8.s8" in made.assembly, "f16.f16" in made.assembly) == (0, True, True)


def test_the_copy_engine_reads_codes():
    spec, form = parse(LINE), Form(64, 64, "bfloat16")
    first = configurations(spec, form, "sm_90")[0]
    assert first.descriptors and first.block_k == 64 and not first.specialised
    made = compile_for(spec, form, "sm_90", first)
    assert isinstance(made, Compiled)
    assert made.refusal() is None and made.copy_engine


POINTERS = {"p_q": "*bf16", "p_k": "*bf16", "p_v": "*bf16", "p_codes": "*i8"}


@pytest.mark.parametrize("kernel", ["code_queries", "code_keys", "code_values", "score_means"])
def test_the_kernels_that_make_codes_compile(kernel):
    line = f"softmax scale(0.125) sink(0.5) precision({INT8}, {FP8}, q_smooth=row // 128, v_smooth=0)"
    made = getattr(load(emit(parse(line), Form(128, 128, "bfloat16"), TILE)), kernel)
    types = POINTERS | ({"p_codes": "*fp8e4nv"} if kernel == "code_values" else {})
    signature = {name: types.get(name, "*fp32" if name.startswith("p_") else "i32") for name in made.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(made.arg_names) if name.startswith(("p_", "s_"))}
    compiled = built(made, signature, {}, aligned, "sm_89", TILE, "")
    assert isinstance(compiled, Compiled)
    assert (compiled.spills, compiled.shared_memory <= ARCHITECTURES["sm_89"].shared_memory) == (0, True)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "gfx942"])
def test_architectures_without_fp8(architecture):
    said = compile_for(parse(LINE), Form(64, 64), architecture, TILE)
    assert isinstance(said, Refusal)
    assert said.reason == f"{architecture} does not multiply fp8 (E4M3): sm_89, sm_90, sm_100, gfx950 do"


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        (f"q=int4, k=int4, {GROUPS}", "Triton has no product of int4, nor have tensor cores since Hopper: int8 takes the same time"),
        ("q=int8, k=int4", "Triton has no product of int4, nor have tensor cores since Hopper: int8 takes the same time"),
        ("q=int8", "q in int8 times k in fp32: int8 times int8 is what this kernel has"),
        ("p=fp8, v=int8", "p in fp8 times v in int8: fp8 times fp8 and fp16 times fp16 is what this kernel has"),
        ("p=fp8, v=fp8", "v in fp8 has one scale for each token"),
        (f"{FP8}, sum=fp16", "sums in fp16 are not what Triton's products of fp8 make"),
        (FP8.replace("64", "48"), "blocks of 48 keys: 32, 64, 128 fit a tile"),
        ("q=int8, k=int8, k_smooth=k // 64", "k and v are smoothed by the mean of all keys only"),
        ("q=int8, k=int8, q_smooth=row // 64", "q is smoothed by the mean of 128 rows only"),
        (f"{FP8}, k_smooth=0", "q or k is smoothed but not rounded"),
        ("q=int8, k=int8, v_smooth=0", "v is smoothed but not rounded"),
        ("q=int8, k=int8, q_group=0", "q_group=0: groups must lie within blocks of 128 rows"),
        ("q=int8, k=int8, k_group=k // 256", "k_group=k // 256: groups must lie within blocks of 128 rows"),
        ("q=int8, k=int8, q_group=row % 8", "q_group=row % 8: groups must lie within blocks of 128 rows"),
    ],
)  # fmt: skip
def test_refusals(precision, reason):
    said = supports(parse(f"softmax precision({precision})"), Form(64, 64))
    assert said is not None
    assert said.reason == reason


def test_norms_and_packed_sequences_are_refused():
    said = supports(parse(f"softmax norm(rms) {SAGE}"), Form(64, 64))
    assert said is not None and said.reason == "q and k are normalised before they are rounded"
    assert supports(parse(f"softmax norm(rms) precision({FP8})"), Form(64, 64)) is None
    said = supports(parse(LINE), Form(64, 64, packed=True))
    assert said is not None and said.reason == "the means and groups of packed sequences are those of each alone"


@pytest.mark.parametrize(
    ("text", "rows"),
    [("row", 1), ("row // 32", 32), ("row // 32 * 8 + row % 8", 32), ("row // 64 * 4 + row % 8 // 2", 64), ("row % 8", None),
     ("row // 32 * 8 + row % 16", None), ("row // 32 + row", None), ("row * 2", None), ("0", None), ("row // 32 * 8 + 7", 32)],
)  # fmt: skip
def test_groups_that_lie_in_blocks(text, rows):
    spec = parse(f"softmax precision(q=int8, k=int8, q_group={text})")
    assert spec.precision is not None
    assert block_of(spec.precision.expr("q_group"), "row") == rows


def test_tiles_take_as_many_keys_as_the_spec_says():
    tiles = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 16, 4, 2))
    assert fitted(tiles, parse(LINE)) == (Tile(128, 64, 8, 2),)
    assert fitted(tiles, parse("softmax precision(q=int8, k=int8)")) == tiles
    assert fitted(tiles, parse("softmax precision(p=fp8, v=fp8, v_axis=channel)")) == tiles[:2]


def test_widths_of_integers():
    assert [pieces_of(width) for width in (16, 32, 40, 64, 80, 96, 128, 200)] == [
        (32, 0), (32, 0), (64, 0), (64, 0), (64, 32), (64, 32), (128, 0), (256, 0),
    ]  # fmt: skip


def test_a_file_holds_what_its_spec_asks_for():
    plain = emit(parse("softmax scale(0.125) causal"), Form(64, 64), TILE)
    assert not re.search("int8|fp8|codes|shifts|deltas|LIFT|CODED", plain)
    text = emit(parse(LINE), Form(64, 64), TILE)
    assert "return row // 32 * 8 + row % 8" in text and "x.to(tl.float8e4nv)" in text
    assert not re.search("p_shifts|p_deltas|p_v_means|EMULATED", text)
    assert max(map(len, text.splitlines()[6:])) <= 130
