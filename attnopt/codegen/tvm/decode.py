"""The family for few queries on a long cache: kernels/decode.py filled in for one spec, one form of its tensors, one tile and one CPU.

    softmax scale(0.125) causal & window(512) offset(size(k) - size(q)) cache(k=int8, v=int4)   ->
    a Python file that holds this attention and nothing else

`supports` says what the family cannot compute; `emit` prints the file. How the cache is stored is the spec's `cache` clause (see
ir/packing). The function that is emitted takes q, k, v, what the cache has of scales, zero points, pages and lengths, the operands in
the order of `spec.operands`, o, and lse where the form asks for it.
"""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import replace

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.prefill_form import Form, expressions, from_rows, positive_scale
from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.template import Renamed, joined
from attnopt.codegen.triton.decode import DecodeForm, of_many_queries, span
from attnopt.codegen.triton.decode_cache import Side, side_of
from attnopt.codegen.tvm import prefill
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.decode_tiles import DecodeTile
from attnopt.codegen.tvm.expressions import Printer, bucket_function, buckets_of
from attnopt.codegen.tvm.operand_buffers import buffer_lines, buffer_name
from attnopt.ir.clause import Clause
from attnopt.ir.expr import indices
from attnopt.ir.naming import renamed
from attnopt.ir.packing import MIDDLE, PER_BYTE, balanced, refusal, tokens_per_scale, uneven
from attnopt.ir.ranges import Range, key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

SIDE = "decode_side"
PARTS = (
    "vectors", "byte_products", "decode_lanes", "decode_cached",
    Renamed(SIDE, (("SIDE_STORED", "D_STORED"), ("SIDE_", "K_"), ("side_", "key_"))),
    Renamed(SIDE, (("SIDE_STORED", "E_STORED"), ("SIDE_", "V_"), ("side_", "value_"))),
    "sight", "decode_rows", "decode_scores", "decode_digits", "decode_values", "decode",
)  # fmt: skip
OPTIONAL = ("k_scales", "k_zeros", "v_scales", "v_zeros", "pages", "lengths", "v_balance")
LOG2E = math.log2(math.e)
LINE = 64  # bytes of a line of a cache

READ = ("int8", "int4")  # codes that are multiplied as whole numbers


def supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the family computes exactly this spec on a cache as the spec stores it; else why not."""
    return of_many_queries(spec) or prefill.supports(spec.with_(cache=None), form) or cache_refusal(spec, form)


def cache_refusal(spec: AttentionSpec, form: Form) -> Refusal | None:
    clause = spec.cache
    if clause is None or (refused := refusal(clause, blocks=True)) is not None:
        return None if clause is None else refused
    layout, page = clause.word("layout"), clause.count("page")
    if "int1" in (clause.word("k"), clause.word("v")):
        return Refusal("the kernels read no int1 codes", clause)
    if layout == "ring":
        return Refusal("a ring does not say which position a token has", clause)
    if layout == "paged" and page == 0:
        return Refusal("a paged cache needs page=", clause)
    if balanced(clause, "v") and (layout == "paged" or spec.mask is not None):
        return Refusal("balanced values are read in one piece, all of them", clause)
    for name, width in (("k", form.width), ("v", form.value_width)):
        side = side_of(spec, form, name)
        shared = tokens_per_scale(clause, name) if side.scales != "none" else 1
        if layout == "paged" and shared > 1 and page % shared:
            return Refusal(f"pages of {page} tokens cut groups of {shared} apart", clause)
        if width % (count := PER_BYTE.get(side.storage, 1)):
            return Refusal(f"rows of {width} channels {uneven(width, count)}", clause)
    return None


def emit(spec: AttentionSpec, form: Form, tile: DecodeTile, cpu: Cpu) -> str:
    """The source of a file with one function, `attention(q, k, v, cache…, operands…, o[, lse])`. Call `supports` first."""
    plain, form = own_names(from_rows(spec.with_(cache=None)), form)
    scope = key_range(plain.mask)
    sides = {name: side_of(spec, form, name) for name in "kv"}
    decided = constants(spec, plain, form, tile, cpu, scope, sides)
    names, given = tuple(buffer_name(operand) for operand in plain.operands), needed(spec, form, sides)
    slots = [
        Slot("operands", names, names),
        Slot("held_values", (), ()),
        Slot("given", tuple(f"p_{name}: T.handle" for name in names), ()),
        Slot("lse", ("lse: T.handle",) if form.lse else (), ("lse",)),
        *(Slot(name, (f"{name}: T.handle",) if name in given else (), (name,)) for name in OPTIONAL),
    ]
    buffers = buffer_lines(plain.operands, prefill.ranks(plain), dict(form.operands))
    template = joined("attnopt.codegen.tvm", PARTS, prefill.IMPORTS).replace("    match_operands()\n", buffers)
    holes = spec_holes(plain, form, scope) | {"folded": folded(tile.sums, int(decided["D_LANES"]))}
    text = specialise(template, decided, holes, slots, keep="attention")
    return f'"""Attention of few queries on a long cache: {spec}\n\n{legend(form, sides, cpu)}\n"""\n\n{text}'


def own_names(spec: AttentionSpec, form: Form) -> tuple[AttentionSpec, Form]:
    """Operands that are called as something in the kernel get a longer name."""
    names = {name: f"{name}_operand" for name in spec.operands if name in taken_names()}
    if not names:
        return spec, form
    sink, offset = (c if c is None else Clause(c.name, (renamed(c.expr(0), names),)) for c in (spec.sink, spec.offset))
    score = tuple(Clause(c.name, (renamed(c.expr(0), names),)) if c.name in ("scale", "add") else c for c in spec.score)
    mask = None if spec.mask is None else renamed(spec.mask, names)
    kinds = tuple((names.get(name, name), dtype) for name, dtype in form.operands)
    return spec.with_(score=score, mask=mask, sink=sink, offset=offset), replace(form, operands=kinds)


@functools.cache
def taken_names() -> frozenset[str]:
    tree = ast.walk(ast.parse(joined("attnopt.codegen.tvm", PARTS, prefill.IMPORTS)))
    given = (getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None) for node in tree)
    return frozenset(name for name in given if isinstance(name, str))


def spec_holes(spec: AttentionSpec, form: Form, scope: Range) -> dict[str, str]:
    """The functions that the spec fills in."""
    buckets = buckets_of(expressions(spec))
    printer = Printer(dict(form.operands)).knowing({term: f"{name}(q, k)" for term, name in buckets.items()})
    found = prefill.score_hole(printer, positive_scale(spec)[1]) | prefill.mask_holes(printer, spec.mask, scope)
    found |= prefill.row_holes(printer, spec) | prefill.range_holes(printer, scope)
    functions = "\n\n".join(bucket_function(term, name) for term, name in buckets.items())  # type: ignore[arg-type]
    return found | ({"first_key": f"{functions}\n\n{found['first_key']}"} if functions else {})


def needed(spec: AttentionSpec, form: Form, sides: dict[str, Side]) -> set[str]:
    """Which of the optional tensors the kernel reads."""
    found = {f"{name}_scales" for name, side in sides.items() if side.scales != "none"}
    found |= {f"{name}_zeros" for name, side in sides.items() if side.zeros}
    if spec.cache is not None and spec.cache.word("layout") == "paged":
        found.add("pages")
    if sides["v"].scales == "balanced":
        found.add("v_balance")
    return found | ({"lengths"} if isinstance(form, DecodeForm) and form.lengths else set())


def constants(
    spec: AttentionSpec, plain: AttentionSpec, form: Form, tile: DecodeTile, cpu: Cpu, scope: Range, sides: dict[str, Side]
) -> dict[str, Value]:
    scale, terms = positive_scale(plain)
    lengths = isinstance(form, DecodeForm) and form.lengths
    page = 0 if spec.cache is None or spec.cache.word("layout") != "paged" else spec.cache.count("page")
    may_be_empty = plain.mask is not None and not (scope.never_empty and plain.offset is None)
    weightless = any(loads_of(c.expr(0)) for c in plain.score if c.name in ("scale", "add"))
    d_lanes = lanes_of(sides["k"], form.width, tile.lanes)
    e_lanes = lanes_of(sides["v"], form.value_width, tile.lanes)
    return {
        "D": form.width, "E": form.value_width, "ROWS": tile.rows, "KEYS": tile.keys, "BLOCK": tile.block, "LANES": tile.lanes,
        "D_LANES": d_lanes, "E_LANES": e_lanes, "PIECE": min(tile.keys, d_lanes), "FOLDED": d_lanes > 1,
        "AHEAD": tile.rows > 1 and {side.storage for side in sides.values()} == {"plain"},
        "E_PARTS": parts(form.value_width // e_lanes, tile.sums // tile.rows),
        **key_constants(sides["k"], form, words_of(sides["k"], cpu)), **value_constants(sides["v"]),
        "DTYPE": form.dtype, "PAGED": page > 0, "PAGE": page, "LENGTHS": lengths, "SPAN": span(scope),
        "SCALE": scale if terms else scale * LOG2E, "UNIT": LOG2E if terms else 1.0, "SCORES": bool(terms), "GATHERS": gathers(plain),
        "OFFSET": plain.offset is not None, "RANGE": scope.bounded, "LEADING": scope.leading is not None,
        "MASK": plain.mask is not None, "INNER_MASK": scope.undecided is not None,
        "PHASES": scope.undecided is not None and scope.undecided == plain.mask and not scope.bounded,
        "SINK": plain.sink is not None, "EMPTY_ROWS": may_be_empty or weightless or lengths,
        "MEAN_OF_EMPTY": may_be_empty and plain.empty_row == "mean" and plain.sink is None, "LSE": form.lse,
    }  # fmt: skip


def gathers(spec: AttentionSpec) -> bool:
    """Whether scores or masks read an operand for each key."""
    return any("k" in indices(load) for expr in expressions(spec) for load in loads_of(expr))


def side_constants(narrow: str, wide: str, side: Side) -> dict[str, Value]:
    """How keys or values are read."""
    shared = PER_BYTE.get(side.storage, 1)
    width = side.stored * shared
    steps = "token" if side.scales == "token" or (side.scales == "group" and side.group >= width) else side.scales
    level = float(MIDDLE.get(side.storage, 0) if side.zeros else -side.centre)
    return {
        f"{narrow}_FORMAT": side.storage, f"{narrow}_NARROW": shared > 1, f"{narrow}_BITS": 8 // shared,
        f"{wide}_STORED": side.stored, f"{narrow}_DTYPE": side.dtype, f"{narrow}_STEPS": steps,
        f"{narrow}_SCALED": steps != "none", f"{narrow}_SCALE_DTYPE": side.scale_dtype, f"{narrow}_GROUP": side.group,
        f"{narrow}_COLUMNS": width if steps in ("channel", "block") else 1 if steps == "balanced" else -(-width // side.group),
        f"{narrow}_ZEROS": side.zeros, f"{narrow}_LEVEL": level,
        f"{narrow}_BYTES": side.row_bytes // side.stored, f"{narrow}_LINE": LINE * side.stored // side.row_bytes,
        f"{narrow}_LINES": -(-side.row_bytes // LINE), f"{narrow}_SHIFTS": steps in ("token", "channel") and (side.zeros or level != 0),
    }  # fmt: skip


def value_constants(side: Side) -> dict[str, Value]:
    """How values are read. Weights are multiplied by what is one number for all channels of a token."""
    found = side_constants("V", "E", side)
    return {**found, "V_BALANCED": side.scales == "balanced", "V_WEIGHED": found["V_STEPS"] in ("token", "balanced")}


def words_of(side: Side, cpu: Cpu) -> int:
    """Words of four codes in a vector, where keys are multiplied as whole numbers; 0 where the CPU has no such product."""
    if not (cpu.has("avx512vnni") or cpu.has("avxvnni")) or side.storage not in READ or side.scales not in ("token", "channel"):
        return 0
    vector = min(cpu.vector_bytes, side.stored & -side.stored)
    return vector // 4 if vector >= 16 else 0


def key_constants(side: Side, form: Form, words: int) -> dict[str, Value]:
    """How keys are read; as whole numbers, int8 codes count from 0."""
    found = side_constants("K", "D", side)
    if not words:
        return {**found, "INTEGER": False}
    digits = 3 if form.dtype == "float32" else 2
    level = float(found["K_LEVEL"]) - (MIDDLE["int8"] if side.storage == "int8" else 0)
    return {
        **found, "INTEGER": True, "K_DIGITS": digits, "LARGEST": 127.0 * 256 ** (digits - 1),
        "WORDS": words, "WORDS_OVER_4": words > 4, "WORDS_OVER_8": words > 8, "K_LEVEL": level,
        "PRODUCT": f"llvm.x86.avx512.vpdpbusd.{32 * words}", "K_SHIFTS": side.zeros or level != 0,
    }  # fmt: skip


def lanes_of(side: Side, width: int, most: int) -> int:
    """Channels of a vector: the largest power of two that divides what is stored of a row, and a group of channels."""
    shared = math.gcd(side.stored, side.group) if side.scales == "group" and side.group < width else side.stored
    return min(most, shared & -shared)


def parts(vectors: int, most: int) -> int:
    """Of the vectors of a row of values those that are summed at once: the largest divisor up to `most`."""
    return next(n for n in range(min(most, vectors), 0, -1) if vectors % n == 0)


def folded(count: int, lanes: int) -> str:
    """The function that sums the lanes of `count` vectors, pair by pair, so that every step halves their number."""
    lines = ["@T.inline", "def folded(sums):", '    """sums[i // D_LANES, i % D_LANES]: the sum over the lanes of sums[i]."""']
    whole, step = "vector(0, D_LANES)", 1
    while step < lanes:
        if count > 1:
            count //= 2
            lines += [
                f"    for i in T.unroll({count}):",
                f"        sums[i, {whole}] = paired(sums[2 * i, {whole}], sums[2 * i + 1, {whole}], {step}, D_LANES)",
            ]
        else:
            swapped = [lane ^ step for lane in range(lanes)]
            lines.append(f"    sums[0, {whole}] = sums[0, {whole}] + T.Shuffle([sums[0, {whole}]], {swapped})")
        step *= 2
    return "\n".join(lines) + "\n"


def legend(form: Form, sides: dict[str, Side], cpu: Cpu) -> str:
    """The head of an emitted file."""
    held = {
        name: "as they are" if side.storage == "plain" else f"as {side.storage} with scales by {side.scales}"
        for name, side in sides.items()
    }
    return "\n".join([
        f"For {form.dtype} queries of {form.width} channels and values of {form.value_width}, any batch, heads and lengths, on {cpu.name}.",
        f"Keys are stored {held['k']}, values {held['v']}.",
        "A task is one split of the blocks of BLOCK keys, for the query heads that share a key head: of ROWS rows at a time it makes the",
        "scores S, their weights, and weighted sums of values. It leaves the largest score (TOPS), the sum of weights (SUMS) and the",
        "weighted sums (PARTS) of each row; the last loop merges the splits of a row in order, whatever the number of threads.",
        "i row of a block, j key of a block, at token, lane of a vector; S[i, j] is a score, then a weight.",
    ])  # fmt: skip
