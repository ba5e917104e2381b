"""What `precision(…)` asks of TVM's family for many queries: what kernels/prefill_codes.py is filled in with, and what is refused.

    precision(q=int8, k=int8, q_group=row // 32, k_group=k // 64, k_smooth=0)   ->   CODED, KEY_MEAN = True …   key_group: return k // 64

q and k are both int8; p and v stay as they come: of eight bits only the first product is made, where the CPU has an instruction for it.
Queries of a group lie in one tile, keys in one block of KEY_ROWS. `python benchmarks/cpu_rounded.py` measures what it is worth.

Tried besides, and not kept: AVX2's own products, of bytes with their signs exchanged (psignb, pmaddubsw, pmaddwd) and of 16 bits (pmaddwd).
For as many channels they are as many instructions as float32 takes, and gain a tenth where AVX-VNNI gains nearly a half.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.specialise import Value
from attnopt.codegen.triton.low_precision import AS_IT_IS, block_of, constant, smoothed
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.expressions import Printer
from attnopt.codegen.tvm.tiles import Tile, tiles
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

QUERY_ROWS = 64  # of the widest tile
KEY_ROWS = 128
WIDER = {32: (Tile(32, 60, 3, 3),)}  # by bytes of a vector: what groups of 32 queries need besides
PRODUCTS = ("avx512vnni", "avxvnni")  # features with a product of bytes


def refusal(spec: AttentionSpec) -> Refusal | None:
    """None where the family computes this precision exactly; else why not."""
    clause = spec.precision
    if clause is None:
        return None
    q, k, p, v = (clause.word(name) for name in "qkpv")
    checks = (
        ((q, k) == ("int8", "int8"), f"q in {q} times k in {k}: int8 times int8 is what this kernel has"),
        ((p, v) == (AS_IT_IS, AS_IT_IS), f"p in {p} times v in {v}: on a CPU weights and values stay as they are"),
        (not smoothed(spec, "q"), "q is smoothed: this kernel takes the mean out of keys only"),
        (not smoothed(spec, "v"), "v is smoothed but not rounded"),
        (constant(clause, "k_smooth"), "k is smoothed by the mean of all keys only"),
        (spec.qk_norm is None, "q and k are normalised before they are rounded"),
    )
    for fits, reason in checks:
        if not fits:
            return Refusal(reason, clause)
    for side, index, most in (("q", "row", QUERY_ROWS), ("k", "k", KEY_ROWS)):
        rows = block_of(clause.expr(f"{side}_group"), index)
        if rows is None or most % rows:
            said = f"{side}_group={clause.expr(f'{side}_group')}: groups must lie within blocks of {most} rows"
            return Refusal(said, clause)
    return None


def refused_by(cpu: Cpu, spec: AttentionSpec, form: Form) -> Refusal | None:
    """Why a CPU cannot: it has no instruction for it, or none of its tiles holds a group of queries. AVX2 alone is no faster so."""
    if spec.precision is None:
        return None
    if not any(cpu.has(feature) for feature in PRODUCTS):
        return Refusal(f"{cpu.name} has no product of bytes: AVX-512 VNNI and AVX-VNNI have one", spec.precision)
    if not tiles_for(spec, cpu, form):
        said = f"no tile for {cpu.name} holds the groups of q_group={spec.precision.expr('q_group')} whole"
        return Refusal(said, spec.precision)
    return None


def constants(spec: AttentionSpec, form: Form, cpu: Cpu, terms: Sequence[Clause]) -> dict[str, Value]:
    """What the template is told. terms: the score terms after the first scale."""
    clause = spec.precision
    if clause is None:
        return {"CODED": False}
    mean = smoothed(spec, "k")
    return {
        "CODED": True, "WORDS": -(-form.width // 4), "KEY_ROWS": KEY_ROWS, "KEY_MEAN": mean,
        "KEY_GROUPS": block_of(clause.expr("k_group"), "k") != 1, "QUERY_GROUPS": block_of(clause.expr("q_group"), "row") != 1,
        "SHIFTED": mean and (form.lse or spec.sink is not None or bool(terms)),
        "PRODUCT": f"llvm.x86.avx512.vpdpbusd.{8 * cpu.vector_bytes}",
    }  # fmt: skip


def holes(spec: AttentionSpec, printer: Printer) -> dict[str, str]:
    """The functions that say which rows share a step."""
    clause = spec.precision
    if clause is None:
        return {}
    groups: tuple[tuple[str, str, Expr], ...] = (
        ("query_group", "row", clause.expr("q_group")),
        ("key_group", "k", clause.expr("k_group")),
    )
    return {
        name: f'def {name}({index}):\n    """{index} -> {expr}"""\n    return {printer.text(expr)}\n'
        for name, index, expr in groups
    }


def tiles_for(spec: AttentionSpec, cpu: Cpu, form: Form) -> tuple[Tile, ...]:
    """The tiles to try, best first: those in which groups of queries lie whole."""
    if spec.precision is None:
        return tiles(cpu, form)
    rows = block_of(spec.precision.expr("q_group"), "row") or 1
    return tuple(tile for tile in (*tiles(cpu, form), *WIDER.get(cpu.vector_bytes, ())) if tile.block_q % rows == 0)
