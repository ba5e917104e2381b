"""Kernels compiled by Triton's own compiler for machines that are not here: what the compiler says they take."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton.compile import Compiled, compile_best, compile_for
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import ARCHITECTURES, SINGLE, TABLE, Tile, tiles
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

INSTRUCTIONS = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
                "gfx942": "v_mfma", "gfx950": "v_mfma"}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_tile_fits(architecture, width):
    spec, form = parse("softmax scale(0.125) causal"), Form(width, width)
    tile = tiles(architecture, width, width, "float16")[0]
    made = compile_for(spec, form, architecture, tile)
    assert isinstance(made, Compiled)
    assert made.refusal() is None
    assert (made.spills, INSTRUCTIONS[architecture] in made.tensor_cores) == (0, True)
    assert 0 < made.registers <= 512
    assert 0 < made.shared_memory <= ARCHITECTURES[architecture].shared_memory
    assert made.binary[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("architecture", "line", "form"),
    [
        ("sm_90", "softmax scale(0.125) softcap(30.0) add(alibi) causal & (window(1000) | global(4)) & padding",
         Form(96, 80, "bfloat16", (("slopes", "float32"), ("padding", "bool")))),
        ("sm_90", "softmax scale(0.125) add(load(bias, b, h, row, k)) offset(size(k) - size(q)) causal & document sink(load(s, h))",
         Form(64, 64, "float16", (("bias", "float16"), ("document", "int64"), ("s", "bfloat16")), True)),
        ("gfx942", "softmax scale(0.125) add((k - q) // 3 * 0.1) window(100) & lookahead(50) & power_blocks(4)", Form(72, 40, "bfloat16")),
        ("sm_80", "softmax scale(0.125) causal", Form(64, 64, "float32")),
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_everything_that_can_be_said_compiles(architecture, line, form):
    made = compile_for(parse(line), form, architecture, Tile(64, 32, 4, 2))
    assert isinstance(made, Compiled)
    assert made.tensor_cores


def test_the_best_tile_is_the_first_that_fits():
    spec, form = parse("softmax scale(0.125) softcap(30.0) causal & window(1024)"), Form(64, 64)
    first, *others = tiles("sm_86", 64, 64, "float16")
    made, tried = compile_best(spec, form, "sm_86"), compile_for(spec, form, "sm_86", first)
    assert isinstance(made, Compiled)
    assert isinstance(tried, Compiled)
    assert made.refusal() is None
    assert made.tile == (first if tried.refusal() is None else others[0])


def test_wide_rows_of_single_precision_fit_somehow():
    made = compile_best(parse("softmax scale(0.125) causal"), Form(256, 256, "float32"), "sm_100")
    assert isinstance(made, Compiled)
    assert made.spills == 0


def test_a_tile_that_does_not_fit_is_refused():
    spec, form, tile = parse("softmax scale(0.125) causal"), Form(128, 128), Tile(128, 64, 8, 4)
    made = compile_for(spec, form, "sm_86", tile)
    assert isinstance(made, Compiled)
    said = made.refusal()
    assert isinstance(said, Refusal)
    assert said.reason == f"{made.shared_memory} bytes of shared memory; sm_86 has 101376"


def test_tiles_for_every_architecture_and_width():
    assert TABLE.keys() == ARCHITECTURES.keys()
    assert all(table.keys() == SINGLE.keys() for table in TABLE.values())
    assert tiles("sm_90", 72, 40, "float16") == TABLE["sm_90"][128]
    assert tiles("sm_90", 40, 72, "float32") == SINGLE[128]
