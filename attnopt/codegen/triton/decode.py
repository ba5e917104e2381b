"""The family for few queries on a long cache: kernels/decode.py filled in for one spec, one form of its tensors and one tile.

    softmax scale(0.125) causal & window(512) offset(size(k) - size(q)) cache(k=int8, v=int4, group=32, layout=paged, page=16)   ->
    a Python file that holds this attention and nothing else

How the cache is stored is the spec's `cache` clause (see ir/packing); what a program reads of it is decided here.
`supports` says what the family cannot compute; `emit` prints the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from attnopt.codegen.specialise import Slot, Value, specialise
from attnopt.codegen.triton import prefill
from attnopt.codegen.triton.decode_cache import Side, cache_refusal, side_of
from attnopt.codegen.triton.prefill import Form, from_rows, operand_names, positive_scale, printer_for, with_functions
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.expr import substitute
from attnopt.ir.linear import linear
from attnopt.ir.packing import MIDDLE, PER_BYTE
from attnopt.ir.ranges import FIRST, LAST, Range, key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

FILES = ("merge.py", "sight.py", "cached.py", "decode.py")  # in the order in which an emitted file has them
PARTS = {"D": ("b_q", "b_q_sum"), "E": ("b_o", "b_shift", "b_sums", "b_shifts")}
IMPORTS = "import functools\nimport math\n\nimport torch\nimport triton\nimport triton.language as tl\n"
LOG2E = 1.4426950408889634
OPTIONAL = ("k_scales", "k_zeros", "v_scales", "v_zeros", "pages", "lengths")


@dataclass(frozen=True)
class DecodeForm(Form):
    """lengths: each sequence has its own."""

    lengths: bool = False


def supports(spec: AttentionSpec, form: Form) -> Refusal | None:
    """None where the family computes exactly this spec on a cache as the spec stores it; else why not."""
    return of_many_queries(spec) or prefill.supports(spec.with_(cache=None), form) or cache_refusal(spec, form)


def of_many_queries(spec: AttentionSpec) -> Refusal | None:
    """What the families for many queries have, and those for few have not."""
    if spec.precision is not None:
        return Refusal("rounded products are those of many queries: a cache says by itself how it is stored", spec.precision)
    if spec.qk_norm is not None:
        return Refusal("keys are normalised as they are read: a cache holds them as they are multiplied", spec.qk_norm)
    if spec.selection is not None:
        return Refusal(
            f"{spec.selection} leaves keys out: few queries read a cache whole, or pages of it by a table", spec.selection
        )
    return None


def emit(spec: AttentionSpec, form: Form, tile: Tile, backend: str = "cuda") -> str:
    """The source of a file with two kernels and `attention(q, k, v, operands…, cache…)`. Call `supports` first."""
    plain = from_rows(spec.with_(cache=None))
    printer, scope = printer_for(spec, form), key_range(plain.mask)
    scale, terms = positive_scale(plain)
    holes = prefill.score_hole(printer, terms) | prefill.mask_holes(printer, plain.mask, scope)
    holes |= prefill.row_holes(printer, plain) | prefill.range_holes(printer, scope)
    pointers, tensors, arguments = operand_names(spec.with_(cache=None))
    sides = {name: side_of(spec, form, name) for name in "kv"}
    values = {
        **constants(spec, form, tile, backend, scope, sides),
        "SCALE": scale,
        "SCORES": bool(terms),
        "UNIT": LOG2E if terms else 1.0,
    }
    given = [Slot(name, (name,) if name in needed(spec, form, sides) else (), (name,)) for name in OPTIONAL]
    slots = [Slot("operands", pointers, pointers), Slot("tensors", tensors, arguments), *given]
    text = specialise(template(), values, functions_first(holes), slots, keep="attention")
    for which, names in PARTS.items():
        text = text if values[f"{which}_PIECES"] != 1 or values[f"{which}_SHARES"] != 1 else in_one_part(text, names)
    return f'"""Attention of few queries on a long cache: {spec}\n\n{legend(form, sides)}\n"""\n\n{text}'


def template() -> str:
    """The files of the family as one: imports and constants once and first, no imports of one another."""
    folder = resources.files("attnopt.codegen.triton") / "kernels"
    constants, bodies = "", ""
    for name in FILES:
        text = (folder / name).read_text(encoding="utf-8")
        text = text[text.index('"""\n\n') + 5 :]  # what follows the docstring
        start = re.search(r"^(?:@|def )", text, re.MULTILINE)
        assert start is not None
        constants += "".join(re.findall(r"^[A-Z][A-Z0-9_]* = .*\n", text[: start.start()], re.MULTILINE))
        bodies += "\n\n" + text[start.start() :]
    return f"{IMPORTS}\n{constants}{bodies}"


def functions_first(holes: dict[str, str]) -> dict[str, str]:
    """The functions that holes call before the first hole of the file, which is the position of the first query."""
    found = with_functions(holes)
    if found["key_range"] == holes["key_range"]:
        return holes
    functions = found["key_range"].removesuffix(holes["key_range"])
    at_first = holes.get("query_offset", UNUSED)
    return holes | {"query_offset": functions + at_first}


UNUSED = '@triton.jit\ndef query_offset(q_len, kv_len):\n    """The position of the first query."""\n    return 0\n'


def needed(spec: AttentionSpec, form: Form, sides: dict[str, Side]) -> set[str]:
    """Which of the optional tensors the kernel reads."""
    found = {f"{name}_scales" for name, side in sides.items() if side.scales != "none"}
    found |= {f"{name}_zeros" for name, side in sides.items() if side.zeros}
    if spec.cache is not None and spec.cache.word("layout") == "paged":
        found.add("pages")
    return found | ({"lengths"} if isinstance(form, DecodeForm) and form.lengths else set())


def constants(
    spec: AttentionSpec, form: Form, tile: Tile, backend: str, scope: Range, sides: dict[str, Side]
) -> dict[str, Value]:
    found = prefill.constants(from_rows(spec.with_(cache=None)), form, tile, backend, scope)
    lengths = isinstance(form, DecodeForm) and form.lengths
    for wide, narrow, side in (("D", "K", sides["k"]), ("E", "V", sides["v"])):
        (piece, count), bits = side.piece, 8 // PER_BYTE[side.storage] if side.storage in PER_BYTE else 0
        found |= {
            f"{wide}_PIECE": piece, f"{wide}_PIECES": count, f"{wide}_SHARES": PER_BYTE.get(side.storage, 1), f"{wide}_STORED": side.stored,
            f"{wide}_PADDED": piece * count > side.stored, f"{narrow}_STORAGE": side.storage, f"{narrow}_SCALES": side.scales,
            f"{narrow}_GROUP": side.group, f"{narrow}_ZEROS": side.zeros, f"{narrow}_CENTRE": side.centre,
            f"{narrow}_MIDDLE": float(MIDDLE.get(side.storage, 0)),
            f"{narrow}_BITS": bits, f"{narrow}_TOP": (1 << bits) - 1,
        }  # fmt: skip
    page = 0 if spec.cache is None or spec.cache.word("layout") != "paged" else spec.cache.count("page")
    return found | {
        "E_WIDTH": 1 << (form.value_width - 1).bit_length(), "DTYPE": form.dtype, "D_WIDTH": 1 << (form.width - 1).bit_length(),
        "K_SHIFTS": sides["k"].zeros and sides["k"].scales in ("token", "channel"),
        "V_SHIFTS": sides["v"].zeros and sides["v"].scales != "block",
        "V_RELATIVE": sides["v"].scales == "group" and form.dtype == "float16", "PAGED": page > 0, "PAGE": page,
        "WHOLE_PAGES": page > 0 and page % tile.block_k == 0, "LENGTHS": lengths, "SPAN": span(scope),
        "EMPTY_ROWS": bool(found["EMPTY_ROWS"]) or lengths,
    }  # fmt: skip


def span(scope: Range) -> int:
    """How many keys one query sees at most, where that is a number; 0 where it is not. Only the number of splits hangs on it."""
    if scope.leading is not None or len(scope.first) != 1 or len(scope.end) != 1:
        return 0
    first, end = (linear(substitute(bounds[0], {}), lambda atom: True) for bounds in (scope.first, scope.end))
    if first is None or end is None:
        return 0
    apart = end - first
    moving = {atom: c for atom, c in apart.terms if c}
    return int(apart.constant) if set(moving) <= {FIRST, LAST} and sum(moving.values()) == 0 and apart.constant > 0 else 0


def in_one_part(text: str, names: tuple[str, ...]) -> str:
    """Tuples of one as what they hold."""
    one = rf"\b({'|'.join(names)})"
    text = re.sub(rf"^ *{one} = \(\)\n", "", text, flags=re.MULTILINE)
    text = re.sub(rf"{one} = \1 \+ \((.*),\)$", r"\1 = \2", text, flags=re.MULTILINE)
    return re.sub(rf"{one}\[0\]", r"\1", text)


def legend(form: Form, sides: dict[str, Side]) -> str:
    """The head of an emitted file."""
    held = {
        name: "as they are" if side.storage == "plain" else f"as {side.storage} with scales by {side.scales}"
        for name, side in sides.items()
    }
    return "\n".join([
        f"For {form.dtype} queries of {form.width} channels and values of {form.value_width}, any batch, heads and lengths.",
        f"Keys are stored {held['k']}, values {held['v']}.",
        "decode: a program holds BLOCK_Q rows, the query heads that share a key head for each of their queries, and walks over its",
        "split of the blocks of BLOCK_K keys; for each row it leaves the largest score, the sum of weights and the weighted sum of",
        "values. merge: a program puts together what the splits found for one row.",
        "Prefixes: p_ pointer, s_ stride, i_ index of a program or block, o_ offsets, m_ mask, b_ block of data.",
    ])  # fmt: skip
