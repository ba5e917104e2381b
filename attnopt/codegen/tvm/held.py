"""What a kernel reads before it is needed, because its vectors run along queries, where memory seldom does.

load(document, b, q)             ->   document_q:  held[0, BLOCK_Q], once for a block of queries
load(bias, b, h, row, k)         ->   bias_qk:     tiles[0, BLOCK_K, BLOCK_Q], once for each step, transposed
load(each, b, h, row, k // 256)  ->   each_qk:     pieces[0, BLOCK_Q], once for each step, where no step has keys of two quotients
load(padding, b, k)              ->   as it stands: one number for all queries of a vector
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from attnopt.codegen.buckets import is_bucket
from attnopt.codegen.tvm.expressions import Printer
from attnopt.codegen.tvm.operand_buffers import buffer_name
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Term, children, expand_term, indices

BUFFERS = {"row": "held", "tile": "tiles", "piece": "pieces"}  # those of whole numbers are called … _whole
SIZES = {name + whole: (name + whole).upper() for name in BUFFERS.values() for whole in ("", "_whole")}


@dataclass(frozen=True)
class Held:
    """By load: its name in expressions, and its buffer and place there."""

    names: dict[Expr, str] = field(default_factory=dict)
    buffers: dict[Expr, tuple[str, int]] = field(default_factory=dict)

    @property
    def places(self) -> tuple[str, ...]:
        """What a function of expressions is given for each name."""
        return tuple(
            f"{buffer}[{at}, {'n_first + i, ' * buffer.startswith('tiles')}x * LANES + j]" for buffer, at in self.buffers.values()
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of the template; a buffer that is not needed has one row, and is pruned."""
        counts = {size: sum(buffer == name for buffer, _ in self.buffers.values()) for name, size in SIZES.items()}
        holds = {f"{prefix}_ANY": bool(counts[prefix] + counts[f"{prefix}_WHOLE"]) for prefix in ("HELD", "TILES", "PIECES")}
        return {size: max(1, count) for size, count in counts.items()} | holds

    def texts(self, printer: Printer) -> dict[Expr, str]:
        """What stands for the loads in expressions; truth values are kept as whole numbers."""
        return {load: f"({name} != 0)" if printer.kind(load) == "bool" else name for load, name in self.names.items()}


def outermost_loads(expr: Expr) -> Iterator[Load]:
    """Loads that stand in no other load."""
    if isinstance(expr, Load):
        yield expr
    elif not is_bucket(expr):
        for child in (expand_term(expr),) if isinstance(expr, Term) else children(expr):
            yield from outermost_loads(child)


def held_loads(exprs: Iterable[Expr], printer: Printer, piece: int = 0) -> Held:
    """piece: no step has keys of two pieces of so many; 0 where steps begin anywhere."""
    held = Held()
    for load in (load for expr in exprs for load in outermost_loads(expr)):
        moving = indices(load)
        if load in held.names or not moving & {"q", "row"}:
            continue
        where = "row" if "k" not in moving else "piece" if piece and by_pieces(load, piece) else "tile"
        buffer = BUFFERS[where] + ("" if printer.kind(load) == "float" else "_whole")
        name = f"{buffer_name(load.operand)}_{'q' if where == 'row' else 'qk'}"
        while name in held.names.values():
            name += "_"
        held.buffers[load] = (buffer, sum(other == buffer for other, _ in held.buffers.values()))
        held.names[load] = name
    return held


def by_pieces(expr: Expr, piece: int) -> bool:
    """Whether it is the same for all keys of a piece: it reads k // n, n a multiple of their number."""
    if isinstance(expr, Apply) and expr.op == "floordiv" and expr.args[0] == Index("k") and isinstance(expr.args[1], Const):
        return int(expr.args[1].value) % piece == 0
    return "k" not in indices(expr) if not children(expr) else all(by_pieces(child, piece) for child in children(expr))


def filled(held: Held, printer: Printer) -> dict[str, str]:
    """The functions of the template that fill the buffers."""
    found: dict[str, str] = {}
    for function, prefix in (("hold_rows", "held"), ("hold_tile", "tiles"), ("hold_piece", "pieces")):
        loads = {load: place for load, place in held.buffers.items() if place[0].startswith(prefix)}
        if loads:
            found[function] = "\n".join(hold_lines(function, loads, held, printer)) + "\n"
    return found


def hold_lines(function: str, loads: dict[Expr, tuple[str, int]], held: Held, printer: Printer) -> list[str]:
    tile = function == "hold_tile"
    keys = {"hold_rows": "", "hold_tile": "k_first, keys, ", "hold_piece": "k, "}[function]
    name = {"hold_rows": "held", "hold_tile": "tiles", "hold_piece": "pieces"}[function]
    names = f"{name}, {name}_whole"
    lines = ["@T.inline", f"def {function}({names}, b, h, q_first, row_first, {keys}q_len, kv_len, operands):"]
    lines.append(f'    """{"; ".join(f"{held.names[load]}: {load}" for load in loads)}"""')
    lines += [
        "    for i in range(BLOCK_Q):",
        "        row: T.let = T.min(row_first + i, q_len - 1)",
        "        q: T.let = q_first + row - row_first",
    ]
    if tile:
        lines += ["        for n in range(keys):", "            k: T.let = k_first + n"]
    for load, (buffer, at) in loads.items():
        text = printer.number(load)
        lines.append(f"    {'    ' * (1 + tile)}{buffer}[{at}, {'n, ' * tile}i] = {text}")
    return lines
