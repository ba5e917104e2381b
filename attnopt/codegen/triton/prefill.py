"""The family for many queries: kernels/prefill.py filled in for one spec, one form of its tensors and one tile.

    softmax scale(0.125) softcap(30.0) causal & window(512)   ->   a Python file that holds this attention and nothing else

`supports` says what the family cannot compute; `emit` prints the file.
"""

from __future__ import annotations

import math

from attnopt.codegen.expressions import loads_of, strides
from attnopt.codegen.prefill_form import DTYPES, WIDEST, Form, expressions, from_rows, positive_scale
from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.template import joined
from attnopt.codegen.triton import listed, low_precision
from attnopt.codegen.triton.expressions import FUNCTIONS, Printer, called, pointer
from attnopt.codegen.triton.row_norms import NORMS, factor_line, gain_arguments, is_static, normed
from attnopt.codegen.triton.row_norms import refusal as norm_refusal
from attnopt.codegen.triton.tiles import SPLIT, Tile
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Load
from attnopt.ir.ranges import Range, extreme, key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.runtime.flex_source import SCORE_TERMS

PARTS = (
    "prefill_holes", "prefill_blocks", "prefill_norms", "prefill_codes", "prefill", "prefill_attend", "prefill_coding", "prefill_launch",
)  # fmt: skip
IMPORTS = ("import torch", "import triton", "import triton.language as tl")
SPECIAL = (
    "offset",
    "sink",
    "shared",
    "qk_norm",
    "precision",
    "selection",
)  # slots beyond the plain ones that the template has a place for
MODS = {
    "relu": "tl.maximum({}, 0.0)", "tanh": "tanh({})", "square": "{0} * {0}", "silu": "{0} * tl.sigmoid({0})", "exp": "tl.exp({})",
    "log1p": "tl.log(1.0 + {})",
}  # fmt: skip
LOG2E = math.log2(math.e)
POSITIONS = "b, h, q, row, k, m_k, q_len, kv_len, operands"


def supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the family computes exactly this spec; else why not."""
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
        return Refusal(f"score term '{term}' is not printed for Triton", term)
    if (
        refused := listed.refusal(spec.selection, form.packed) or norm_refusal(spec) or low_precision.refusal(spec, form.packed)
    ) is not None:
        return refused
    printer = printer_for(spec, form)
    return next((r for e in expressions(spec) if (r := printer.refusal(e)) is not None), None)


def printer_for(spec: AttentionSpec, form: Form) -> Printer:
    return Printer(dict(form.operands), from_zero=spec.offset is None)


def emit(spec: AttentionSpec, form: Form, tile: Tile, backend: str = "cuda") -> str:
    """The source of a file with a kernel and `attention(q, k, v, operands…)`. Call `supports` first."""
    plain = from_rows(spec)
    printer, scope = printer_for(spec, form), key_range(plain.mask)
    scale, terms = positive_scale(plain)
    holes = (
        score_hole(printer, terms)
        | mask_holes(printer, plain.mask, scope)
        | row_holes(printer, plain)
        | range_holes(printer, scope)
    )
    pointers, tensors, arguments = operand_names(spec)
    decided = constants(plain, form, tile, backend, scope)
    holes |= {name: hole(name, *said[:2], [said[2]])[name] for name, said in low_precision.groups(plain, printer).items()}
    decided |= low_precision.constants(plain, scale, terms, form.lse, backend) | listed.constants(
        spec.selection, tile, scope, bool(terms)
    )
    if decided["INT8_SCORES"]:  # the scales of the queries hold it
        scale = 1.0
    if spec.qk_norm is not None:  # the scale is one more factor on the channels of a query, before it is rounded
        factor = scale * LOG2E if decided["STATIC"] and not terms else scale
        body = [factor_line(spec.qk_norm, factor, bool(decided["D_PADDED"]))]
        holes |= hole(
            "channel_factor", "h, key_head, d, operands", f"{spec.qk_norm} {spec.score[0] if scale != 1 else ''}".strip(), body
        )
        scale = 1.0
    text = specialise(
        joined("attnopt.codegen.triton", PARTS, IMPORTS),
        {**decided, "SCALE": scale, "SCORES": bool(terms)},
        with_functions(holes),
        [
            Slot("operands", pointers, pointers),
            Slot("given", tensors, tensors),
            Slot("tensors", tensors, arguments),
            Slot("tiles_map", (), listed.operand(spec.selection)),
        ],
        keep="attention_packed" if form.packed else "attention",
    )
    return f'"""Attention: {spec}\n\n{legend(form)}\n"""\n\n{text}'


def constants(spec: AttentionSpec, form: Form, tile: Tile, backend: str, scope: Range) -> dict[str, Value]:
    norm, whole = spec.qk_norm, spec.qk_norm is not None  # of a row that is normalised there is one piece
    d_main, d_rest = (max(16, 1 << (form.width - 1).bit_length()), 0) if whole else pieces(form.width)
    e_main, e_rest = pieces(form.value_width)
    codes = low_precision.scores(spec)  # rows of codes are as wide as their product
    d_main, d_rest = low_precision.pieces_of(form.width) if codes else (d_main, d_rest)
    may_be_empty = spec.selection is not None or (spec.mask is not None and not (scope.never_empty and spec.offset is None))
    static = spec.precision is None and is_static(spec, form.width, form.dtype, dict(form.limits))
    scale, terms = positive_scale(spec)
    # A term that reads data may be minus infinity everywhere.
    weightless = any(loads_of(c.expr(0)) for c in spec.score if c.name in ("scale", "add"))
    return {
        "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "NUM_WARPS": tile.num_warps, "NUM_STAGES": tile.num_stages,
        "PROGRAMS": tile.programs, "PACKED": form.packed, "PERSISTENT": tile.persistent or form.packed,
        "DESCRIPTORS": tile.descriptors, "SPECIALISED": tile.specialised, "STATIC": static,
        "STATIC_SCALE": LOG2E if terms else 1.0 if whole else scale * LOG2E,
        "FACTORS": whole, "Q_NORM": normed(norm, "q"), "K_NORM": normed(norm, "k"),
        "NORM": NORMS[norm.word(0)] if norm is not None else "rms", "EPS": norm.number("eps") if norm is not None else 0.0,
        "CENTERED": norm is not None and (norm.word(0) == "layer" or norm.word("center") == "yes"),
        "D": form.width, "D_MAIN": d_main, "D_REST": d_rest, "D_PADDED": d_main + d_rest > form.width and not codes,
        "E": form.value_width, "E_MAIN": e_main, "E_REST": e_rest, "E_PADDED": e_main + e_rest > form.value_width,
        "PRECISION": "tf32x3" if form.dtype == "float32" and backend == "cuda" and max(form.width, form.value_width) <= SPLIT else "ieee",
        "PHASES": int(tile.specialised or (scope.undecided is not None and scope.undecided == spec.mask and not scope.bounded)),
        "RANGE": scope.bounded, "MASK": spec.mask is not None, "INNER_MASK": scope.undecided is not None,
        "LEADING": scope.leading is not None, "LEFT_EDGE": bool(scope.inner_first), "LONGEST_FIRST": scope.grows,
        "OFFSET": spec.offset is not None, "SINK": spec.sink is not None, "EMPTY_ROWS": may_be_empty or weightless or form.packed,
        "MEAN_OF_EMPTY": may_be_empty and spec.empty_row == "mean" and spec.sink is None, "LSE": form.lse,
    }  # fmt: skip


def pieces(width: int) -> tuple[int, int]:
    """A row as one power of two, or as two: 96 is 64 and 32. What is left over of the last is not read."""
    main = max(16, 1 << (width.bit_length() - 1))
    if main >= width:
        return main, 0
    rest = max(16, 1 << (width - main - 1).bit_length())
    return (main, rest) if rest < main else (2 * main, 0)


def hole(name: str, parameters: str, docstring: str, body: list[str]) -> dict[str, str]:
    lines = ["@triton.jit", f"def {name}({parameters}):", f'    """{docstring}"""', *(f"    {line}" for line in body)]
    return {name: "\n".join(lines) + "\n"}


def score_hole(printer: Printer, terms: tuple[Clause, ...]) -> dict[str, str]:
    if not terms:
        return {}
    knowing, loads = printer.holding(c.expr(0) for c in terms if c.name in ("scale", "add"))
    body = loads + [score_line(knowing, term) for term in terms]
    body[-1] = body[-1].replace("score = ", "return ", 1)
    return hole("score_mod", f"score, {POSITIONS}", " ".join(map(str, terms)), body)


def score_line(printer: Printer, term: Clause) -> str:
    if term.name == "softcap":
        cap = float(term.number(0))
        return f"score = {cap!r} * tanh(score * {1 / cap!r})"
    if term.name == "mod":
        return f"score = {MODS[term.word(0)].format('score')}"
    scales = term.name == "scale"
    return f"score = score {'*' if scales else '+'} {printer.real(term.expr(0), 5 if scales else 4)}"


def mask_holes(printer: Printer, mask: Expr | None, scope: Range) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, expr in (("mask_mod", mask), ("inner_mask_mod", scope.undecided)):
        if expr is not None:
            knowing, loads = printer.holding([expr])
            found |= hole(name, POSITIONS, str(expr), [*loads, f"return {knowing.truth(expr)}"])
    return found


def row_holes(printer: Printer, spec: AttentionSpec) -> dict[str, str]:
    """The sink of a row, and the position of the first query."""
    found: dict[str, str] = {}
    if spec.sink is not None:
        knowing, loads = printer.holding([spec.sink.expr(0)])
        body = [*loads, f"return tl.cast({knowing.text(spec.sink.expr(0))}, tl.float32)"]
        found |= hole("sink_logit", "b, h, q, row, q_len, kv_len, operands", str(spec.sink), body)
    if spec.offset is not None:
        found |= hole("query_offset", "q_len, kv_len", str(spec.offset), [f"return {printer.text(spec.offset.expr(0))}"])
    return found


def range_holes(printer: Printer, scope: Range) -> dict[str, str]:
    def text(bounds: tuple[Expr, ...], op: str, otherwise: str) -> str:
        return printer.text(extreme(op, bounds)) if bounds else otherwise

    which = "q_first, q_last, q_len, kv_len"
    seen = f"return {text(scope.first, 'max', '0')}, {text(scope.end, 'min', 'kv_len')}"
    inner = f"return {text(scope.inner_first, 'max', '0')}, {text(scope.inner_end, 'min', 'kv_len')}"
    found = hole("key_range", which, "Keys that any query of q_first … q_last sees: the first, and one past the last.", [seen])
    found |= hole(
        "inner_range", which, "Keys that all queries of q_first … q_last see: the first, and one past the last.", [inner]
    )
    if scope.leading is not None:
        body = [f"return {printer.text(scope.leading)}"]
        found |= hole("leading_keys", "q_len, kv_len", "So many keys from the first on are seen besides.", body)
    return found


def with_functions(holes: dict[str, str]) -> dict[str, str]:
    """The functions that the holes call, before the first of them."""
    needed = [FUNCTIONS[name] for name in called("\n".join(holes.values()))]
    if not needed:
        return holes
    return holes | {"key_range": "\n\n".join([*needed, holes["key_range"]])}


def operand_names(spec: AttentionSpec) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """For each operand: parameters of the kernel, parameter of `attention`, what that passes on."""
    loads: list[Load] = [load for expr in expressions(spec) for load in loads_of(expr)]
    pointers: list[str] = []
    arguments: list[str] = []
    for operand, dims in strides(loads).items():
        name = pointer(operand)
        pointers += [name, *(f"s_{name[2:]}_{at}" for at in dims)]
        arguments += [name[2:], *(f"{name[2:]}.stride({at})" for at in dims)]
    for parameters, passed in gain_arguments(spec.qk_norm).values():
        pointers += parameters
        arguments += passed
    tensors = tuple(pointer(operand)[2:] for operand in spec.operands)
    return tuple(pointers), tensors, tuple(arguments)


def legend(form: Form) -> str:
    """The head of an emitted file."""
    return "\n".join([
        f"For {form.dtype} rows of {form.width} channels (q, k) and {form.value_width} (v), any batch, heads and lengths.",
        "A program holds BLOCK_Q rows of one head and walks over blocks of BLOCK_K keys; for each row it keeps the largest score",
        "(b_top), the sum of weights (b_sum) and the weighted sum of values (b_o).",
        "Prefixes: p_ pointer, s_ stride, i_ index of a program or block, o_ offsets, m_ mask, b_ block of data.",
    ])  # fmt: skip
