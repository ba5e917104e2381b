"""What Hopper adds to a tile, and what the compiler makes of it: the copy engine, programs that go on, warps with parts of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.codegen.triton.compile import Compiled, compile_best, compile_for
from attnopt.codegen.triton.configurations import configurations, specialised
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import TABLE, Tile, tiles
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

FULL, CAUSAL, WINDOW = (parse(f"softmax scale(0.125) {mask}") for mask in ("", "causal", "causal & window(512)"))


def kinds(spec, form, architecture):
    return [(t.persistent, t.descriptors, t.specialised) for t in configurations(spec, form, architecture)]


def test_what_is_tried_on_hopper():
    assert kinds(CAUSAL, Form(128, 128), "sm_90") == [(True, True, False)] * 4 + [(True, False, False)] * 4
    assert kinds(WINDOW, Form(128, 128), "sm_90")[0] == (False, True, False)  # all its rows see as many keys
    assert kinds(FULL, Form(128, 128), "sm_90")[:2] == [(False, True, True), (False, True, False)]
    assert kinds(FULL, Form(128, 128), "sm_100")[0] == (False, True, False)
    assert kinds(CAUSAL, Form(100, 128), "sm_90")[0] == (True, False, False)  # rows of 200 bytes


@pytest.mark.parametrize(
    ("architecture", "form"), [("sm_80", Form(64, 64)), ("gfx942", Form(64, 64)), ("sm_90", Form(64, 64, "float32"))]
)
def test_elsewhere_the_table_stands_as_it_is(architecture, form):
    assert configurations(CAUSAL, form, architecture) == tiles(architecture, form.width, form.value_width, form.dtype)


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (CAUSAL, Form(128, 128)),
        (FULL, Form(96, 128)),
        (FULL, Form(128, 128, packed=True)),
        (parse("softmax norm(l2)"), Form(64, 64)),
    ],
)
def test_what_is_not_specialised(spec, form):
    assert specialised(spec, form, "sm_90") == ()


@pytest.mark.parametrize(
    ("line", "form"),
    [
        ("softmax scale(0.125) causal", Form(128, 128, "bfloat16")),
        ("softmax norm(rms, q_gain=g) scale(0.125)", Form(64, 64, "bfloat16", (("g", "bfloat16"),), limits=(("g", 2.0),))),
        ("softmax scale(0.125) causal & window(512)", Form(192, 128, packed=True, lse=True)),
    ],
)
def test_hopper_reads_with_the_copy_engine(line, form):
    made = compile_best(parse(line), form, "sm_90")
    assert isinstance(made, Compiled)
    assert made.tile.descriptors and made.copy_engine
    assert (made.spills, made.tensor_cores) == (0, ("wgmma.mma_async",))
    assert "ex2.approx.ftz.f32" in made.assembly
    assert ".local" not in made.assembly


def test_specialised_warps_or_the_portable_form():
    """Versions of Triton differ in whether they split warps: the assembly says so, and no other kernel passes for one."""
    made = compile_best(FULL, Form(128, 128), "sm_90")
    assert isinstance(made, Compiled)
    assert made.tile.specialised == made.specialised == ("setmaxnreg" in made.assembly)
    assert made.refusal() is None and made.copy_engine
    said = replace(made, tile=replace(made.tile, specialised=True), assembly="wgmma.mma_async").refusal()
    assert isinstance(said, Refusal)
    assert said.reason == "the compiler did not specialise warps"


def test_a_tile_without_the_copy_engine_is_refused():
    made = compile_for(CAUSAL, Form(64, 64), "sm_80", Tile(64, 32, 4, 2, descriptors=True))
    assert isinstance(made, Compiled)
    said = made.refusal()
    assert said is not None and said.reason == "the compiler did not use the copy engine"


@pytest.mark.parametrize(
    ("architecture", "form"),
    [("sm_80", Form(192, 192)), ("sm_80", Form(256, 256, "float32")), ("sm_100", Form(192, 128)), ("gfx942", Form(160, 160))],
)
def test_wide_rows_fit_somehow(architecture, form):
    made = compile_best(CAUSAL, form, architecture)
    assert isinstance(made, Compiled)
    assert made.spills == 0
    assert made.tile in configurations(CAUSAL, form, architecture)


def test_programs_of_a_multiprocessor():
    assert [Tile(128, 128, 8, 2).programs, Tile(64, 64, 4, 2).programs, Tile(128, 128, 4, 2, specialised=True).programs] == [
        1,
        2,
        1,
    ]
    assert all(tile.num_warps in (4, 8) for table in TABLE.values() for row in table.values() for tile in row)
