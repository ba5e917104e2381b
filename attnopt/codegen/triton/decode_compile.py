"""Compile the two kernels of the decode family for an architecture, and read what the compiler says they take.

compile_best(spec, form, "sm_90")   ->   Compiled of `decode`, with the first tile that fits
compile_merge(spec, form, "sm_90", tile)   ->   Compiled of `merge`, from the same source
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.compile import ALIGNED, TYPES, Compiled, built, last_strides
from attnopt.codegen.triton.decode import emit
from attnopt.codegen.triton.decode_cache import Side, side_of
from attnopt.codegen.triton.decode_tiles import decode_tiles
from attnopt.codegen.triton.expressions import pointer
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

MERGE_WARPS = 4
INTEGERS = {"p_pages": "*i32", "p_lengths": "*i32"}


def compile_best(spec: AttentionSpec, form: Form, architecture: str, block_q: int = 16) -> Compiled | Refusal:
    """`decode` with the first tile of the table that neither spills nor exceeds the shared memory."""
    refused: Refusal | None = None
    for tile in decode_tiles(architecture, spec, form, block_q):
        compiled = compile_for(spec, form, architecture, tile)
        refused = compiled if isinstance(compiled, Refusal) else compiled.refusal()
        if refused is None:
            return compiled
    assert refused is not None
    return refused


def compile_for(spec: AttentionSpec, form: Form, architecture: str, tile: Tile) -> Compiled | Refusal:
    """`decode` as assembly and binary, for tensors that are contiguous in their last dimension."""
    return compiled(spec, form, architecture, tile, "decode")


def compile_merge(spec: AttentionSpec, form: Form, architecture: str, tile: Tile) -> Compiled | Refusal:
    """`merge` of the source that this tile makes."""
    return compiled(spec, form, architecture, tile, "merge")


def compiled(spec: AttentionSpec, form: Form, architecture: str, tile: Tile, name: str) -> Compiled | Refusal:
    source = emit(spec, form, tile, ARCHITECTURES[architecture].backend)
    kernel: Any = getattr(load(source), name)
    sides = {side: side_of(spec, form, side) for side in "kv"}
    ones = dict.fromkeys(last_strides(spec.with_(cache=None)) & set(kernel.arg_names), 1)
    signature = {x: "constexpr" if x in ones else type_of(x, form, sides) for x in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", ALIGNED]] for at, x in enumerate(kernel.arg_names) if is_aligned(x, form, sides)}
    options = tile if name == "decode" else replace(tile, num_warps=MERGE_WARPS, num_stages=1)
    return built(kernel, signature, ones, aligned, architecture, options, source)


def type_of(parameter: str, form: Form, sides: dict[str, Side]) -> str:
    """The Triton type of a parameter of an emitted kernel."""
    if parameter in ("p_k", "p_v"):
        side = sides[parameter[2]]
        return TYPES.get(side.dtype, TYPES["uint8"])
    if parameter in ("p_ks", "p_kz", "p_vs", "p_vz"):
        return TYPES[sides[parameter[2]].scale_dtype]
    if parameter in ("p_q", "p_o"):
        return TYPES[form.dtype]
    if parameter in ("p_part", "p_stats", "p_lse"):
        return TYPES["float32"]
    return INTEGERS.get(parameter) or {pointer(name): TYPES[dtype] for name, dtype in form.operands}.get(parameter, "i32")


def is_aligned(parameter: str, form: Form, sides: dict[str, Side]) -> bool:
    """Whether a parameter is a multiple of ALIGNED where tensors are as torch makes them."""
    if parameter.startswith("p_"):
        return True
    widths = {"q": form.width, "k": sides["k"].stored, "v": sides["v"].stored}
    return (
        parameter in {f"s_{x}" for x in ("qb", "qh", "qm", "kb", "kh", "kn", "vb", "vh", "vn")}
        and widths[parameter[2]] % ALIGNED == 0
    )
