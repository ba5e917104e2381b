"""The family for few queries on a long cache: kernels/decode.py filled in for one spec, one form of its tensors, one tile and one CPU.

    softmax scale(0.125) causal & window(512) offset(size(k) - size(q)) cache(k=int8, v=int4)   ->
    a Python file that holds this attention and nothing else

`supports` says what the family cannot compute; `emit` prints the file. How the cache is stored is the spec's `cache` clause (see
ir/packing). The function that is emitted takes q, k, v, what the cache has of scales, zero points, pages and lengths, the operands in
the order of `spec.operands`, o, and lse where the form asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from attnopt.codegen.expressions import loads_of, plain_name
from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.template import joined
from attnopt.codegen.triton import prefill
from attnopt.codegen.triton.decode import DecodeForm, span
from attnopt.codegen.triton.decode_cache import Side, side_of
from attnopt.codegen.triton.prefill import Form, from_rows, positive_scale
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.decode_tiles import DecodeTile
from attnopt.codegen.tvm.expressions import RESERVED, Printer
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Load
from attnopt.ir.packing import MIDDLE, refusal, tokens_per_scale
from attnopt.ir.ranges import Range, extreme, key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.runtime.flex_source import SCORE_TERMS

PARTS = ("decode_vectors", "decode_cached", "decode_sight", "decode")
OPTIONAL = ("k_scales", "k_zeros", "v_scales", "v_zeros", "pages", "lengths")
SPECIAL = ("offset", "sink", "shared", "cache")
DTYPES = ("float32", "float16", "bfloat16")
WIDEST = 256
POSITIONS = "b, h, q, row, k, q_len, kv_len, operands"
LOG2E = math.log2(math.e)


def supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the family computes exactly this spec on a cache as the spec stores it; else why not."""
    if spec.normalizer.name != "softmax":
        return Refusal(f"the normaliser is {spec.normalizer}, not softmax", spec.normalizer)
    if special := [slot for slot in spec.special if slot not in SPECIAL]:
        return Refusal(f"{special[0]} is not part of this kernel", spec)
    if spec.heads is not None and spec.heads.operand("map") is not None:
        return Refusal("query heads are mapped to key heads by a table", spec.heads)
    if form.dtype not in DTYPES:
        return Refusal(f"dtype {form.dtype}", form.dtype)
    if not 1 <= min(form.width, form.value_width) <= max(form.width, form.value_width) <= WIDEST:
        return Refusal(f"rows of {form.width} and {form.value_width} channels; up to {WIDEST} fit", spec.width)
    if (term := next((c for c in spec.score if c.name not in SCORE_TERMS), None)) is not None:
        return Refusal(f"score term '{term}' is not printed for TVM", term)
    printer = printer_for(spec, form)
    return next((r for e in prefill.expressions(spec) if (r := printer.refusal(e)) is not None), None) or cache_refusal(spec, form)


def cache_refusal(spec: AttentionSpec, form: Form) -> Refusal | None:
    clause = spec.cache
    if clause is None or (refused := refusal(clause)) is not None:
        return None if clause is None else refused
    layout, page = clause.word("layout"), clause.count("page")
    if layout == "ring":
        return Refusal("a ring does not say which position a token has", clause)
    if layout == "paged" and page == 0:
        return Refusal("a paged cache needs page=", clause)
    for name, width in (("k", form.width), ("v", form.value_width)):
        side = side_of(spec, form, name)
        shared = tokens_per_scale(clause, name) if side.scales != "none" else 1
        if layout == "paged" and shared > 1 and page % shared:
            return Refusal(f"pages of {page} tokens cut groups of {shared} apart", clause)
        if side.storage == "int4" and width % 2:
            return Refusal("rows of an odd width cannot be packed two to a byte", clause)
    return None


def printer_for(spec: AttentionSpec, form: Form) -> Printer:
    return Printer(dict(form.operands), from_zero=spec.offset is None)


def emit(spec: AttentionSpec, form: Form, tile: DecodeTile, cpu: Cpu) -> str:
    """The source of a file with one function, `attention(q, k, v, cache…, operands…, o[, lse])`. Call `supports` first."""
    plain = from_rows(spec.with_(cache=None))
    printer, scope = printer_for(spec, form), key_range(plain.mask)
    sides = {name: side_of(spec, form, name) for name in "kv"}
    decided = constants(spec, plain, form, tile, scope, sides)
    holes = score_holes(printer, plain) | range_holes(printer, scope) | {"folded": folded(tile.sums, int(decided["D_LANES"]))}
    names = [plain_name(operand, RESERVED) for operand in plain.operands]
    buffers = [f"{name}_" for name in names]
    given = needed(spec, form, sides)
    slots = [
        Slot("operands", tuple(buffers), tuple(buffers)),
        Slot("tensors", tuple(f"{name}: T.handle" for name in names), ()),
        Slot("lse", ("lse: T.handle",) if form.lse else (), ("lse",)),
        *(Slot(name, (f"{name}: T.handle",) if name in given else (), (name,)) for name in OPTIONAL),
    ]
    source = joined("attnopt.codegen.tvm", PARTS).replace("    operand_buffers()\n", operand_buffers(plain, form))
    text = specialise(source, decided, holes, slots, keep="attention")
    return f'"""Attention of few queries on a long cache: {spec}\n\n{legend(form, sides, cpu)}\n"""\n\n{text}'


def needed(spec: AttentionSpec, form: Form, sides: dict[str, Side]) -> set[str]:
    """Which of the optional tensors the kernel reads."""
    found = {f"{name}_scales" for name, side in sides.items() if side.scales != "none"}
    found |= {f"{name}_zeros" for name, side in sides.items() if side.zeros}
    if spec.cache is not None and spec.cache.word("layout") == "paged":
        found.add("pages")
    return found | ({"lengths"} if isinstance(form, DecodeForm) and form.lengths else set())


def constants(
    spec: AttentionSpec, plain: AttentionSpec, form: Form, tile: DecodeTile, scope: Range, sides: dict[str, Side]
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
        "E_PARTS": parts(form.value_width // e_lanes, tile.sums // tile.rows),
        **side_constants("K", "D", sides["k"]), **side_constants("V", "E", sides["v"]),
        "DTYPE": form.dtype, "PAGED": page > 0, "PAGE": page, "LENGTHS": lengths, "SPAN": span(scope),
        "SCALE": scale if terms else scale * LOG2E, "UNIT": LOG2E if terms else 1.0, "SCORES": bool(terms),
        "OFFSET": plain.offset is not None, "RANGE": scope.bounded, "LEADING": scope.leading is not None,
        "MASK": plain.mask is not None, "INNER_MASK": scope.undecided is not None,
        "PHASES": scope.undecided is not None and scope.undecided == plain.mask and not scope.bounded,
        "SINK": plain.sink is not None, "EMPTY_ROWS": may_be_empty or weightless or lengths,
        "MEAN_OF_EMPTY": may_be_empty and plain.empty_row == "mean" and plain.sink is None, "LSE": form.lse,
    }  # fmt: skip


def side_constants(narrow: str, wide: str, side: Side) -> dict[str, Value]:
    """How keys or values are read."""
    width = side.stored * (2 if side.storage == "int4" else 1)
    steps = "token" if side.scales == "token" or (side.scales == "group" and side.group >= width) else side.scales
    level = float(MIDDLE.get(side.storage, 0) if side.zeros else -side.centre)
    return {
        f"{narrow}_FORMAT": side.storage, f"{wide}_STORED": side.stored, f"{narrow}_DTYPE": side.dtype, f"{narrow}_STEPS": steps,
        f"{narrow}_SCALED": steps != "none", f"{narrow}_SCALE_DTYPE": side.scale_dtype, f"{narrow}_GROUP": side.group,
        f"{narrow}_ZEROS": side.zeros, f"{narrow}_LEVEL": level,
        f"{narrow}_SHIFTS": steps in ("token", "channel") and (side.zeros or level != 0),
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
    step = 1
    while step < lanes:
        if count > 1:
            count //= 2
            lines += [
                f"    for i in T.unroll({count}):",
                f"        sums[i, vector(0, {lanes})] = paired(sums[2 * i, vector(0, {lanes})], sums[2 * i + 1, vector(0, {lanes})], {step}, {lanes})",
            ]
        else:
            swapped = [lane ^ step for lane in range(lanes)]
            lines.append(f"    sums[0, vector(0, {lanes})] = sums[0, vector(0, {lanes})] + T.Shuffle([sums[0, vector(0, {lanes})]], {swapped})")
        step *= 2
    return "\n".join(lines) + "\n"


def operand_buffers(spec: AttentionSpec, form: Form) -> str:
    """The lines that name the shape and the strides of each operand."""
    ranks = {load.operand: len(load.indices) for expr in prefill.expressions(spec) for load in loads_of(expr)}
    lines = []
    for operand in spec.operands:
        name, rank = plain_name(operand, RESERVED), ranks[operand]
        sizes = ", ".join(f"n_{name}_{at}" for at in range(rank))
        strides = ", ".join(f"s_{name}_{at}" for at in range(rank))
        lines.append(f"{sizes}, {strides} = {', '.join(['T.int64()'] * (2 * rank))}")
        lines.append(f'{name}_ = T.match_buffer({name}, ({sizes},), "{dict(form.operands)[operand]}", strides=({strides},), align=1)')
    return "".join(f"    {line}\n" for line in lines)


def hole(name: str, parameters: str, docstring: str, body: Iterable[str], *, inline: bool = False) -> dict[str, str]:
    lines = [*(["@T.inline"] if inline else []), f"def {name}({parameters}):", f'    """{docstring}"""', *(f"    {line}" for line in body)]
    return {name: "\n".join(lines) + "\n"}


def score_holes(printer: Printer, spec: AttentionSpec) -> dict[str, str]:
    """The functions that act on one score or on one row."""
    _, terms = positive_scale(spec)
    found: dict[str, str] = {}
    if terms:
        body = [score_line(printer, term) for term in terms]
        found |= hole("score_mod", f"S, i, j, {POSITIONS}", " ".join(map(str, terms)), body, inline=True)
    for name, expr in (("mask_mod", spec.mask), ("inner_mask_mod", key_range(spec.mask).undecided)):
        if expr is not None:
            body = [f'S[i, j] = T.if_then_else({printer.truth(expr)}, S[i, j], T.float32(float("-inf")))']
            found |= hole(name, f"S, i, j, {POSITIONS}", str(expr), body, inline=True)
    if spec.sink is not None:
        body = [f'X[0] = T.cast({printer.text(spec.sink.expr(0))}, "float32")']
        found |= hole("sink_logit", "X, b, h, q, row, q_len, kv_len, operands", str(spec.sink), body, inline=True)
    if spec.offset is not None:
        found |= hole("query_offset", "q_len, kv_len", str(spec.offset), [f"return {printer.text(spec.offset.expr(0))}"])
    return found


MODS = {
    "relu": "T.max({}, T.float32(0))", "tanh": "tanh({})", "square": "{0} * {0}", "silu": "{0} * T.sigmoid({0})", "exp": "T.exp({})",
    "log1p": "T.log(T.float32(1) + {})",
}  # fmt: skip


def score_line(printer: Printer, term: Clause) -> str:
    if term.name == "softcap":
        cap = float(term.number(0))
        return f"S[i, j] = T.float32({cap!r}) * T.tanh(S[i, j] * T.float32({1 / cap!r}))"
    if term.name == "mod":
        return f"S[i, j] = {MODS[term.word(0)].format('S[i, j]')}"
    scales = term.name == "scale"
    power = printer.binding.product if scales else printer.binding.sum
    return f"S[i, j] = S[i, j] {'*' if scales else '+'} {printer.real(term.expr(0), power + 1)}"


def range_holes(printer: Printer, scope: Range) -> dict[str, str]:
    """Of the keys that queries see the first and the end."""
    which = "q_first, q_last, q_len, kv_len"
    found: dict[str, str] = {}
    for name, bounds, op, text in (
        ("first_key", scope.first, "max", "The first key that any of the queries q_first … q_last sees."),
        ("end_key", scope.end, "min", "One past the last key that any of the queries q_first … q_last sees."),
        ("first_inner_key", scope.inner_first, "max", "The first of the keys that all of the queries q_first … q_last see."),
        ("end_inner_key", scope.inner_end, "min", "One past the last of the keys that all of the queries q_first … q_last see."),
    ):
        if bounds:
            found |= hole(name, which, text, [f"return {printer.text(extreme(op, bounds))}"])
    if scope.leading is not None:
        body = [f"return {printer.text(scope.leading)}"]
        found |= hole("leading_keys", "q_len, kv_len", "So many keys from the first on are seen besides.", body)
    return found


def legend(form: Form, sides: dict[str, Side], cpu: Cpu) -> str:
    """The head of an emitted file."""
    held = {
        name: "as they are" if side.storage == "plain" else f"as {side.storage} with scales by {side.scales}"
        for name, side in sides.items()
    }
    return "\n".join([
        f"For {form.dtype} queries of {form.width} channels and values of {form.value_width}, any batch, heads and lengths; vectors of {cpu.name}.",
        f"Keys are stored {held['k']}, values {held['v']}.",
        "A task is one split of the blocks of BLOCK keys, for the query heads that share a key head: of ROWS rows at a time it makes the",
        "scores S, their weights, and weighted sums of values. It leaves the largest score (TOPS), the sum of weights (SUMS) and the",
        "weighted sums (PARTS) of each row; the last loop merges the splits of a row in order, whatever the number of threads.",
        "i row of a block, j key of a block, at token, l lane of a vector; S[i, j] is a score, then a weight.",
    ])  # fmt: skip
