"""Decode kernels compiled by Triton's own compiler for machines that are not here: what the compiler says they take."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_compile import compile_for, compile_merge
from attnopt.codegen.triton.decode_tiles import AMD, NVIDIA, block_rows, decode_tiles
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.spec import parse

PLAIN = parse("softmax scale(0.125)")
# A tile of 16 rows is too small for the bulk products of Hopper and Blackwell.
SMALL = {name: "mma.sync" if about.backend == "cuda" else "v_mfma" for name, about in ARCHITECTURES.items()}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_tile_fits(architecture, width):
    form = DecodeForm(width, width, "bfloat16")
    made = compile_for(PLAIN, form, architecture, decode_tiles(architecture, PLAIN, form)[0])
    assert isinstance(made, Compiled)
    assert made.refusal() is None
    assert (made.spills, SMALL[architecture] in made.tensor_cores) == (0, True)
    assert made.binary[:4] == b"\x7fELF"
    if architecture.startswith("sm"):  # two programs stand on a processor
        assert 2 * made.shared_memory <= ARCHITECTURES[architecture].shared_memory
        assert 2 * made.registers * 32 * made.tile.num_warps <= 65536


@pytest.mark.parametrize(
    ("architecture", "cache"),
    [
        ("sm_90", "k=int8, v=int8"),
        ("sm_90", "k=int4, v=int4, group=64"),
        ("sm_90", "k=int2, v=int2, group=32"),
        ("sm_80", "k=fp8, v=fp8, layout=paged, page=16"),
        ("gfx942", "k=int8, v=fp8, k_axis=channel, v_axis=channel"),
    ],
)
def test_caches(architecture, cache):
    spec, form = parse(f"softmax scale(0.125) cache({cache})"), DecodeForm(128, 128, "bfloat16", lengths=True)
    made = compile_for(spec, form, architecture, decode_tiles(architecture, spec, form)[0])
    assert isinstance(made, Compiled)
    assert (made.refusal(), SMALL[architecture] in made.tensor_cores) == (None, True)


def test_everything_that_can_be_said_compiles():
    line = (
        "softmax scale(0.125) softcap(30.0) add(alibi) offset(size(k) - size(q)) causal & (window(1000) | global(4)) & padding"
        " sink(load(s, h)) cache(k=int8, v=int4, k_axis=channel, layout=paged, page=16, scales=fp16)"
    )
    form = DecodeForm(80, 64, "bfloat16", (("slopes", "float32"), ("padding", "bool"), ("s", "bfloat16")), True, lengths=True)
    made, merge = (compiler(parse(line), form, "sm_90", Tile(32, 32, 4, 2)) for compiler in (compile_for, compile_merge))
    assert isinstance(made, Compiled)
    assert isinstance(merge, Compiled)
    assert made.source == merge.source
    assert merge.refusal() is None


def test_tiles_by_the_bytes_of_a_row():
    form = DecodeForm(128, 128)
    assert decode_tiles("sm_90", PLAIN, form) == NVIDIA[256]
    assert decode_tiles("gfx942", parse("softmax cache(k=int4, v=int8)"), form) == AMD[128]
    assert decode_tiles("sm_90", PLAIN, DecodeForm(128, 128, "float32"), 64)[0] == Tile(64, 32, 4, 3)
    assert [block_rows(rows) for rows in (1, 8, 17, 40, 500)] == [16, 16, 32, 64, 64]
