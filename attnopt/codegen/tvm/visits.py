"""Which pieces of the keys a block of queries visits when only data tells: by a list of blocks, and by numbers that must be equal.

    blocks(64, 64, operand=map)           ->   of the keys, those pieces that map [b, h, row // 64] has
    load(ids, b, q) == load(ids, b, k)    ->   pieces where some id of the queries lies between the smallest and the largest of the keys
    load(seen, b, k)                      ->   pieces with a key that is seen: 1 must be equal to it

The smallest and the largest of each piece are found once, before; where both are those of all queries, no mask is asked. What a list
says of single rows is a part of the mask where queries of a block have different rows of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.skipped_tiles import skipped
from attnopt.codegen.specialise import Value
from attnopt.codegen.tvm.expressions import Printer
from attnopt.codegen.tvm.operand_buffers import buffer_name
from attnopt.codegen.tvm.tiles import Tile
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, apply, conjunction, conjuncts, expand, indices
from attnopt.ir.ranges import key_range
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

VECTOR, TALLEST, WIDEST = 16, 128, 512  # queries of a vector, and of a thread; keys of a tile whose values may be skipped
OF_QUERIES, OF_KEYS = {"b", "h", "q", "row"}, {"b", "h", "k"}


@dataclass(frozen=True)
class Match:
    """A query sees no key unless `query` (of b, h, q and row) equals `key` (of b, h and k); part: of the mask."""

    query: Expr
    key: Expr
    part: Expr


@dataclass(frozen=True)
class Visits:
    """selection: blocks(m, n, operand=…). whole: inside the range that all queries see, matches alone decide of the mask."""

    selection: Clause | None
    matches: tuple[Match, ...]
    whole: bool
    chunk: int

    def __bool__(self) -> bool:
        return self.selection is not None or bool(self.matches)

    @property
    def constants(self) -> dict[str, Value]:
        """Those of the template."""
        by_head = any("h" in indices(match.key) for match in self.matches)
        made: dict[str, Value] = {
            "VISITS": bool(self),
            "LISTED": self.selection is not None,
            "CHUNK": self.chunk,
            "WHOLE": self.whole,
        }
        skips = skipped(self.selection) is not None
        made |= {"SKIPS": skips} | ({"SKIP": float(self.selection.number("skip"))} if skips and self.selection else {})
        if self:  # pieces that matches leave to the mask are at an edge
            made["INNER_MASK"] = False
        return made | {"MATCHES": len(self.matches), "MATCH_HEADS": by_head}


def refusal(selection: Clause | None) -> Refusal | None:
    if selection is not None and selection.name != "blocks":
        return Refusal(f"{selection.name} chooses keys from the scores; a kernel takes blocks(m, n, operand=…)", selection)
    if selection is None:
        return None
    if 0 in (selection.count(0), selection.count(1)):
        return Refusal(f"{selection} has blocks of nothing", selection)
    if (grain := skipped(selection)) is not None:
        rows, keys = grain
        if not rows or rows % VECTOR or rows > TALLEST or selection.count(0) % rows or keys > WIDEST:
            said = f"a thread skips the values of {VECTOR} to {TALLEST} queries, a part of a tile, and of up to {WIDEST} keys"
            return Refusal(f"{said}: not of {rows} x {keys}", selection)
    return None


def list_entry(selection: Clause) -> Load:
    """What the list says of a query and a key."""
    rows, keys = (apply("floordiv", Index(x), selection.count(at)) for at, x in enumerate(("row", "k")))
    return Load(str(selection.operand("operand")), (Index("b"), Index("h"), rows, keys))


def entry_text(selection: Clause, row: str, key: str, printer: Printer) -> str:
    """The same in a kernel, as a truth value: a list may hold for all batches or heads."""
    name = buffer_name(str(selection.operand("operand")))
    first = ", ".join(f"T.min({index}, {name}.shape[{at}] - 1)" for at, index in enumerate("bh"))
    read = f"{name}[{first}, {row}, {key}]"
    return read if printer.kind(list_entry(selection)) == "bool" else f"({read} != 0)"


def knowing_list(printer: Printer, selection: Clause | None) -> Printer:
    """A printer that knows what reads the list."""
    if selection is None:
        return printer
    text = entry_text(selection, f"row // {selection.count(0)}", f"k // {selection.count(1)}", printer)
    return printer.knowing({list_entry(selection): text})


def with_list(spec: AttentionSpec) -> AttentionSpec:
    """The list as a part of the mask."""
    return spec if spec.selection is None else spec.with_(mask=conjunction(spec.mask, list_entry(spec.selection)), selection=None)


def visits_of(spec: AttentionSpec, tile: Tile, printer: Printer) -> tuple[Visits, AttentionSpec]:
    """How blocks of a tile visit the keys, and the spec with all that its mask must say."""
    selection = spec.selection
    matches = tuple(found for part in conjuncts(spec.mask) if (found := match_of(part, printer)) is not None)
    uneven = selection is not None and selection.count(0) % tile.block_q != 0
    plain = with_list(spec) if uneven else spec.with_(selection=None)
    left = set(conjuncts(key_range(plain.mask).undecided)) - {match.part for match in matches}
    keys = tile.block_k if selection is None else selection.count(1)
    chunk = max(n for n in range(1, min(keys, tile.block_k) + 1) if keys % n == 0)
    return Visits(selection, matches, not left, chunk), plain


def match_of(part: Expr, printer: Printer) -> Match | None:
    """The whole numbers that a part of a mask compares, where they are data."""
    expr = expand(part)
    if not loads_of(expr):
        return None
    if indices(expr) <= OF_KEYS:
        return Match(Const(1), Apply("ne", (expr, Const(0))) if printer.kind(expr) != "bool" else expr, part)
    if not isinstance(expr, Apply) or expr.op != "eq" or any(printer.kind(side) == "float" for side in expr.args):
        return None
    for query, key in (expr.args, expr.args[::-1]):
        if indices(query) <= OF_QUERIES and indices(key) <= OF_KEYS:
            return Match(query, key, part)
    return None


def holes(visits: Visits, tile: Tile, printer: Printer) -> dict[str, str]:
    found: dict[str, str] = {}
    if visits.selection is not None:
        found["is_chosen"] = chosen_lines(visits.selection, tile, printer)
    if visits.matches:
        found["match_queries"] = match_lines(
            "match_queries(spans, b, h, q_first, row_first, q_len, kv_len, operands)", "BLOCK_Q",
            ["row: T.let = T.min(row_first + i, q_len - 1)", "q: T.let = q_first + row - row_first"],
            "spans[", (match.query for match in visits.matches), printer,
        )  # fmt: skip
        found["match_keys"] = match_lines(
            "match_keys(key_spans, at, b, h, k_first, keys, q_len, kv_len, operands)", "keys", ["k: T.let = k_first + i"],
            "key_spans[at, ", (match.key for match in visits.matches), printer,
        )  # fmt: skip
    return found


def chosen_lines(selection: Clause, tile: Tile, printer: Printer) -> str:
    """Some row of the list that queries of the block have says so."""
    m, n = selection.count(0), selection.count(1)
    key = f"k_first // {n}"
    if m % tile.block_q == 0:
        texts = [entry_text(selection, f"row_first // {m}", key, printer)]
    else:
        count = (tile.block_q - 2) // m + 2
        rows = [f"T.min(row_first // {m} + {i}, row_last // {m})" for i in range(count)]
        texts = [entry_text(selection, row, key, printer) for row in rows]
    lines = ["found = " + texts[0], *(f"found = found | {text}" for text in texts[1:]), "return found"]
    said = '    """Whether the list has the keys from k_first on for some query of a block."""'
    return "\n".join(["def is_chosen(b, h, row_first, row_last, k_first, operands):", said, *(f"    {x}" for x in lines)]) + "\n"


def match_lines(head: str, count: str, positions: list[str], place: str, exprs: Iterable[Expr], printer: Printer) -> str:
    """A function that finds the smallest and the largest of each expression; [MATCHES, 2]."""
    start, body, said = [], [], []
    for at, expr in enumerate(exprs):
        low, high, text = f"{place}{at}, 0]", f"{place}{at}, 1]", printer.number(expr)
        said.append(str(expr))
        if indices(expr):
            start += [f"{low} = T.int32(2147483647)", f"{high} = T.int32(-2147483648)"]
            body += [f"{low} = T.min({low}, {text})", f"{high} = T.max({high}, {text})"]
        else:
            start += [f"{low} = {text}", f"{high} = {text}"]
    loop = [f"for i in range({count}):", *(f"    {x}" for x in (*positions, *body))] if body else []
    return "\n".join(["@T.inline", f"def {head}:", f'    """{"; ".join(said)}"""', *(f"    {x}" for x in (*start, *loop))]) + "\n"
