"""What `precision(…)` asks of the prefill family: which constants and functions of its template are set, and what it refuses.

    precision(q=int8, k=int8, k_group=k // 64, k_smooth=0, p=fp8, v=fp8, v_axis=channel, block=64)
        ->   INT8_SCORES, KEY_MEAN, FP8_VALUES = True …      key_group: return k // 64

q and k are both int8 or both as they come; p and v both fp8, both fp16, or as they come. A program makes the codes of CODED_ROWS rows,
so groups of rows that share a scale must lie within blocks of as many. With `block=n` a tile takes n keys at a time, as the spec says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from attnopt.codegen.specialise import Value
from attnopt.codegen.triton.expressions import Printer
from attnopt.codegen.triton.tiles import ARCHITECTURES, Tile
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, Index
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

INTERPRETER = "interpreter"  # a backend whose fp8 is rounded wrongly: kernels for it do without the type
CODED_ROWS = 128
AS_IT_IS = "fp32"
SCORES = ((AS_IT_IS, AS_IT_IS), ("int8", "int8"))
VALUES = ((AS_IT_IS, AS_IT_IS), ("fp16", "fp16"), ("fp8", "fp8"))
BLOCKS = (0, 32, 64, 128)
LEAST = 32  # channels or keys of one product of eight bits
# Architectures with E4M3: that of gfx942 ends at 240, and of sm_86 there is none.
FP8 = ("sm_89", "sm_90", "sm_100", "gfx950")


def scores(spec: AttentionSpec) -> bool:
    """Whether q k' is a product of integers."""
    return spec.precision is not None and spec.precision.word("k") == "int8"


def values(spec: AttentionSpec) -> str:
    """The type of p and v: "fp8", "fp16", or "fp32" for what they are."""
    return AS_IT_IS if spec.precision is None else spec.precision.word("v")


def smoothed(spec: AttentionSpec, side: str) -> bool:
    return spec.precision is not None and spec.precision.expr_or_none(f"{side}_smooth") is not None


def refusal(spec: AttentionSpec, packed: bool) -> Refusal | None:
    """None where the family computes this precision exactly; else why not."""
    clause = spec.precision
    if clause is None:
        return None
    pairs = tuple((clause.word(a), clause.word(b)) for a, b in ("qk", "pv"))
    if "int4" in pairs[0]:
        return Refusal("Triton has no product of int4, nor have tensor cores since Hopper: int8 takes the same time", clause)
    checks = (
        (pairs[0] in SCORES, f"q in {pairs[0][0]} times k in {pairs[0][1]}: int8 times int8 is what this kernel has"),
        (
            pairs[1] in VALUES,
            f"p in {pairs[1][0]} times v in {pairs[1][1]}: fp8 times fp8 and fp16 times fp16 is what this kernel has",
        ),
        (not packed, "the means and groups of packed sequences are those of each alone"),
        (not (scores(spec) and spec.qk_norm is not None), "q and k are normalised before they are rounded"),
        (pairs[1][1] != "fp8" or clause.word("v_axis") == "channel", "v in fp8 has one scale for each token"),
        (clause.word("sum") != "fp16", "sums in fp16 are not what Triton's products of fp8 make"),
        (
            clause.count("block") in BLOCKS,
            f"blocks of {clause.count('block')} keys: {', '.join(map(str, BLOCKS[1:]))} fit a tile",
        ),
        (constant(clause, "k_smooth") and constant(clause, "v_smooth"), "k and v are smoothed by the mean of all keys only"),
        (clause.expr_or_none("q_smooth") in (None, per_block()), f"q is smoothed by the mean of {CODED_ROWS} rows only"),
        (scores(spec) or not (smoothed(spec, "q") or smoothed(spec, "k")), "q or k is smoothed but not rounded"),
        (values(spec) != AS_IT_IS or not smoothed(spec, "v"), "v is smoothed but not rounded"),
    )
    for fits, reason in checks:
        if not fits:
            return Refusal(reason, clause)
    for side, index in (("q", "row"), ("k", "k")):
        rows = block_of(clause.expr(f"{side}_group"), index)
        if scores(spec) and (rows is None or CODED_ROWS % rows):
            said = f"{side}_group={clause.expr(f'{side}_group')}: groups must lie within blocks of {CODED_ROWS} rows"
            return Refusal(said, clause)
    return None


def refused_by(architecture: str, spec: AttentionSpec) -> Refusal | None:
    """Why an architecture has no instruction for it. Triton's interpreter has all."""
    if values(spec) == "fp8" and architecture in ARCHITECTURES and architecture not in FP8:
        return Refusal(f"{architecture} does not multiply fp8 (E4M3): {', '.join(FP8)} do", spec.precision)
    return None


def constant(clause: Clause, option: str) -> bool:
    return isinstance(clause.expr_or_none(option), Const | None)


def per_block() -> Expr:
    return Apply("floordiv", (Index("row"), Const(CODED_ROWS)))


def block_of(expr: Expr, index: str) -> int | None:
    """Rows of equal group lie in one block of so many, counted from 0; None where that is not plain to see.

    row -> 1, row // 32 -> 32, row // 32 * 8 + row % 8 -> 32: the sum tells its first part where the second stays below the factor.
    """
    if expr == Index(index):
        return 1
    match expr:
        case Apply("floordiv", (Index(name), Const(int(rows)))) if name == index and rows > 0:
            return rows
        case Apply("add", (Apply("mul", (Apply("floordiv", _) as block, Const(int(factor)))), rest)):
            below = most(rest, index)
            return block_of(block, index) if below is not None and below < factor else None
    return None


def most(expr: Expr, index: str) -> int | None:
    """The largest value of an expression of remainders of a row, which is never below 0."""
    match expr:
        case Const(int(number)) if number >= 0:
            return number
        case Apply("mod", (Index(name), Const(int(rows)))) if name == index and rows > 0:
            return rows - 1
        case Apply("floordiv", (inside, Const(int(rows)))) if rows > 0:
            below = most(inside, index)
            return None if below is None else below // rows
    return None


def pieces_of(width: int) -> tuple[int, int]:
    """A row of integers as one or two widths of products: 96 is 64 and 32."""
    main = max(LEAST, 1 << (width.bit_length() - 1))
    if main >= width:
        return main, 0
    rest = max(LEAST, 1 << (width - main - 1).bit_length())
    return (main, rest) if rest < main else (2 * main, 0)


def constants(spec: AttentionSpec, scale: float, terms: Sequence[Clause], lse: bool, backend: str) -> dict[str, Value]:
    """What the template is told. scale: the first of the spec; terms: the score terms after it."""
    whole, kind = scores(spec), values(spec)
    linear = all(c.name == "add" for c in terms)
    shifted = smoothed(spec, "k") and (spec.sink is not None or lse or not linear)
    rows = whole and not terms and not smoothed(spec, "q")
    return {
        "INT8_SCORES": whole, "FP8_VALUES": kind == "fp8", "HALF_VALUES": kind == "fp16",
        "KEY_MEAN": smoothed(spec, "k"), "QUERY_MEANS": smoothed(spec, "q"), "VALUE_MEAN": smoothed(spec, "v"),
        "SHIFTED_SCORES": shifted and not linear, "SHIFTED_TOP": shifted and linear, "ROW_FACTORS": rows,
        "SCORE_SCALE": scale, "QUERY_FACTOR": scale * math.log2(math.e) if rows else scale,
        "MEAN_PRECISION": "tf32x3" if backend == "cuda" else "ieee", "EMULATED": backend == INTERPRETER,
    }  # fmt: skip


def groups(spec: AttentionSpec, printer: Printer) -> dict[str, tuple[str, str, str]]:
    """The functions that say which rows share a scale: parameters, docstring, body."""
    if not scores(spec):
        return {}
    clause = spec.precision
    assert clause is not None
    found = {"query_group": ("row", clause.expr("q_group")), "key_group": ("k", clause.expr("k_group"))}
    return {name: (index, f"{index} -> {expr}", f"return {printer.text(expr)}") for name, (index, expr) in found.items()}


def fitted(tiles: Sequence[Tile], spec: AttentionSpec) -> tuple[Tile, ...]:
    """The tiles with as many keys in a step as the spec says, each once."""
    block = 0 if spec.precision is None else spec.precision.count("block")
    least = LEAST if values(spec) == "fp8" else 1
    kept = (replace(tile, block_k=block) if block else tile for tile in tiles if tile.block_k >= least)
    return tuple(dict.fromkeys(kept))
