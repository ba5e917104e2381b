"""The family for many queries: kernels/prefill.py filled in for one spec, one form of its tensors, one tile and one CPU.

    softmax scale(0.125) softcap(30.0) causal & window(512)   ->   a Python file that holds this attention and nothing else

`supports` says what the family cannot compute; `emit` prints the file.
"""

from __future__ import annotations

import math
import re

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.prefill_form import DTYPES, WIDEST, Form, expressions, from_rows, positive_scale
from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.template import joined
from attnopt.codegen.triton.row_norms import gains
from attnopt.codegen.triton.row_norms import refusal as norm_refusal
from attnopt.codegen.tvm import low_precision, row_norms, visits
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.expressions import Printer, bucket_function, buckets_of
from attnopt.codegen.tvm.held import filled, held_loads
from attnopt.codegen.tvm.operand_buffers import buffer_lines, buffer_name
from attnopt.codegen.tvm.tiles import Tile
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr
from attnopt.ir.ranges import Range, extreme, key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.runtime.flex_source import SCORE_TERMS

PARTS = (
    "vectors",
    "byte_products",
    "prefill_holes",
    "sight",
    "prefill_visits",
    "prefill_norms",
    "prefill_codes",
    "prefill_rows",
    "prefill",
)
IMPORTS = ("from tvm.script import tirx as T",)
SPECIAL = (
    "offset",
    "sink",
    "shared",
    "selection",
    "qk_norm",
    "precision",
)  # slots beyond the plain ones that the template has a place for
MODS = {
    "relu": "T.max({}, T.float32(0))", "tanh": "tanh({})", "square": "{0} * {0}", "silu": "{0} * sigmoid({0})", "exp": "exp({})",
    "log1p": "T.log(T.float32(1) + {})",
}  # fmt: skip
POSITIONS = "b, h, q, row, k, q_len, kv_len, operands, held_values"


def supports(spec: AttentionSpec, form: Form, cpu: Cpu | None = None) -> Refusal | None:
    """None where the family computes exactly this spec, on this CPU or on any that has the instructions; else why not."""
    if spec.normalizer.name != "softmax":
        return Refusal(f"the normaliser is {spec.normalizer}, not softmax", spec.normalizer)
    if special := [slot for slot in spec.special if slot not in SPECIAL]:
        return Refusal(f"{special[0]} is not part of this kernel", spec)
    if spec.heads is not None and spec.heads.operand("map") is not None:
        return Refusal("query heads are mapped to key heads by a table", spec.heads)
    if form.packed:
        return Refusal("sequences that stand one after the other in one tensor", form)
    if form.dtype not in DTYPES:
        return Refusal(f"dtype {form.dtype}", form.dtype)
    if not 1 <= min(form.width, form.value_width) <= max(form.width, form.value_width) <= WIDEST:
        return Refusal(f"rows of {form.width} and {form.value_width} channels; up to {WIDEST} fit", spec.width)
    if (term := next((c for c in spec.score if c.name not in SCORE_TERMS), None)) is not None:
        return Refusal(f"score term '{term}' is not printed for TVM", term)
    if (refused := visits.refusal(spec.selection) or norm_refusal(spec) or low_precision.refusal(spec)) is not None:
        return refused
    if cpu is not None and (refused := low_precision.refused_by(cpu, spec, form)) is not None:
        return refused
    printer = Printer(dict(form.operands))
    return next((r for e in expressions(spec) if (r := printer.refusal(e)) is not None), None)


def emit(spec: AttentionSpec, form: Form, tile: Tile, cpu: Cpu) -> str:
    """The source of a file with the kernel `attention(q, k, v, operands…, o[, lse])`. Call `supports` first."""
    buckets = buckets_of(expressions(spec))
    printer = Printer(dict(form.operands)).knowing({term: f"{name}(q, k)" for term, name in buckets.items()})
    printer = visits.knowing_list(printer, spec.selection)
    visited, plain = visits.visits_of(from_rows(spec), tile, printer)
    scope = key_range(plain.mask)
    scale, terms = positive_scale(plain)
    held = held_loads(expressions(plain), printer, visited.chunk if visited else 0)
    knowing = printer.knowing(held.texts(printer))
    holes = (
        score_hole(knowing, terms)
        | mask_holes(knowing, plain.mask, scope)
        | row_holes(knowing, plain)
        | range_holes(printer, scope)
        | filled(held, printer)
        | visits.holes(visited, tile, printer)
        | row_norms.holes(spec)
        | low_precision.holes(spec, printer)
    )
    functions = "\n\n".join(bucket_function(term, name) for term, name in buckets.items())  # type: ignore[arg-type]
    if functions:
        holes |= {"first_key": f"{functions}\n\n{holes['first_key']}"}
    names = tuple(buffer_name(operand) for operand in spec.operands)
    handles = tuple(f"p_{name}: T.handle" for name in names)
    template = joined("attnopt.codegen.tvm", PARTS, IMPORTS)
    text = specialise(
        template.replace("    match_operands()\n", buffer_lines(spec.operands, ranks(spec), dict(form.operands))),
        {
            **constants(plain, form, tile, cpu, scope, bool(visited.selection)),
            **held.sizes,
            **visited.constants,
            **row_norms.constants(spec),
            **low_precision.constants(spec, form, cpu, terms),
            "SCALE": scale,
            "SCORES": bool(terms),
            "UNIT": LOG2E if terms else scale * LOG2E,
            "TOP": 1.0 if terms else scale,
        },
        holes,
        [
            Slot("given", handles, ()),
            Slot("p_lse", ("p_lse: T.handle",) * form.lse, ("p_lse",)),
            Slot("operands", names, names),
            Slot("held_values", tuple(held.names.values()), held.places),
        ],
        keep="attention",
    )
    return f'"""Attention: {spec}\n\n{legend(form, tile, cpu)}\n"""\n\n{text}'


def ranks(spec: AttentionSpec) -> dict[str, int]:
    """How many dimensions each operand has."""
    loads = [load for expr in expressions(visits.with_list(spec)) for load in loads_of(expr)]
    return {load.operand: len(load.indices) for load in loads} | dict.fromkeys(gains(spec.qk_norm).values(), 2)


def constants(spec: AttentionSpec, form: Form, tile: Tile, cpu: Cpu, scope: Range, listed: bool) -> dict[str, Value]:
    """listed: a list of blocks says which keys are visited."""
    lanes = cpu.vector_bytes // 4
    may_be_empty = listed or (spec.mask is not None and not (scope.never_empty and spec.offset is None))
    # A term that reads data may be minus infinity everywhere.
    weightless = any(loads_of(c.expr(0)) for c in spec.score if c.name in ("scale", "add"))
    undecided = scope.undecided is not None and scope.undecided == spec.mask and not scope.bounded
    edges = 3 if scope.leading is not None else 2 if scope.inner_first and not undecided else 1
    return {
        "DTYPE": form.dtype, "D": form.width, "E": form.value_width, "LANES": lanes, "VECTORS": tile.block_q // lanes,
        "LANES_OVER_4": lanes > 4, "LANES_OVER_8": lanes > 8, "D_SQUARES": form.width // lanes, "D_REST": form.width % lanes,
        "E_SQUARES": form.value_width // lanes, "E_REST": form.value_width % lanes,
        "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "KEYS": tile.keys, "CHANNELS": tile.channels,
        "CHANNELS_REST": form.value_width % tile.channels, "STAGED": form.dtype != "float32",
        "PHASES": int(undecided), "RANGE": scope.bounded, "MASK": spec.mask is not None, "INNER_MASK": scope.undecided is not None,
        "LEADING": scope.leading is not None, "EDGES": edges, "GROWS": scope.grows, "OFFSET": spec.offset is not None,
        "SINK": spec.sink is not None, "EMPTY_ROWS": may_be_empty or weightless,
        "MEAN_OF_EMPTY": may_be_empty and spec.empty_row == "mean" and spec.sink is None, "LSE": form.lse,
    }  # fmt: skip


def hole(name: str, parameters: str, docstring: str, body: list[str]) -> dict[str, str]:
    lines = [f"def {name}({parameters}):", f'    """{docstring}"""', *(f"    {line}" for line in body)]
    return {name: "\n".join(lines) + "\n"}


def score_hole(printer: Printer, terms: tuple[Clause, ...]) -> dict[str, str]:
    if not terms:
        return {}
    body = [score_line(printer, term) for term in terms]
    body[-1] = body[-1].replace("score = ", "return ", 1)
    return hole("score_mod", f"score, {POSITIONS}", " ".join(map(str, terms)), body)


def score_line(printer: Printer, term: Clause) -> str:
    if term.name == "softcap":
        cap = float(term.number(0))
        return f"score = T.float32({cap!r}) * tanh(score * T.float32({1 / cap!r}))"
    if term.name == "mod":
        return f"score = {MODS[term.word(0)].format('score')}"
    scales = term.name == "scale"
    number = printer.real(term.expr(0), printer.binding.unary if scales else printer.binding.product)
    return f"score = score {'*' if scales else '+'} {number}"


def mask_holes(printer: Printer, mask: Expr | None, scope: Range) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, expr in (("mask_mod", mask), ("inner_mask_mod", scope.undecided)):
        if expr is not None:
            found |= hole(name, POSITIONS, str(expr), [f"return {printer.truth(expr)}"])
    return found


def row_holes(printer: Printer, spec: AttentionSpec) -> dict[str, str]:
    """The sink of a row, and the position of the first query."""
    found: dict[str, str] = {}
    if spec.sink is not None:
        parameters = "b, h, q, row, q_len, kv_len, operands, held_values"
        found |= hole("sink_logit", parameters, str(spec.sink), [f"return {as_float(printer, spec.sink.expr(0))}"])
    if spec.offset is not None:
        found |= hole("query_offset", "q_len, kv_len", str(spec.offset), [f"return {printer.text(spec.offset.expr(0))}"])
    return found


def as_float(printer: Printer, expr: Expr) -> str:
    text = printer.real(expr)
    return f"T.float32({text})" if re.fullmatch(r"-?[\d.e+-]+", text) else text


def range_holes(printer: Printer, scope: Range) -> dict[str, str]:
    bounds = (
        ("first_key", scope.first, "max", "0", "The first key that any of the queries q_first … q_last sees."),
        ("end_key", scope.end, "min", "kv_len", "The key after the last that any of the queries q_first … q_last sees."),
        ("inner_first_key", scope.inner_first, "max", "0", "The first of the keys that all of the queries q_first … q_last see."),
        ("inner_end_key", scope.inner_end, "min", "kv_len", "The key after the last of those that all queries see."),
    )  # fmt: skip
    found: dict[str, str] = {}
    for name, values, op, otherwise, said in bounds:
        text = printer.text(extreme(op, values)) if values else otherwise
        found |= hole(name, "q_first, q_last, q_len, kv_len", said, [f"return {text}"])
    if scope.leading is not None:
        said = "So many keys from the first on are seen besides."
        found |= hole("leading_keys", "q_len, kv_len", said, [f"return {printer.text(scope.leading)}"])
    return found


def legend(form: Form, tile: Tile, cpu: Cpu) -> str:
    """The head of an emitted file."""
    return "\n".join([
        f"For {form.dtype} rows of {form.width} channels (q, k) and {form.value_width} (v), any batch, heads and lengths, on {cpu.name}.",
        f"A thread holds {tile.block_q} queries of one head, side by side in vectors, and walks blocks of {tile.block_k} keys; for each",
        "query it keeps the largest score (top), the sum of weights (total) and the weighted sum of values (o_t).",
        "Names: i_ index of a block, s_ stride, p_ argument; what ends in _t is transposed: queries along the last axis.",
    ])  # fmt: skip


LOG2E = math.log2(math.e)
