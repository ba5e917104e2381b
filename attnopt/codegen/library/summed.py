"""softmax … plus(-load(factor0), softmax …, q=q1, k=k1)   ->   two calls of one kernel, scaled and added

Every kernel that can compute the parts computes the sum: it is called once for each part, on the queries and keys of that part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.lowering import Lowering, first_refusal
from attnopt.codegen.materialize import Materializer, as_dtype, writable
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr
from attnopt.ir.graph import Value
from attnopt.ir.layout import Layout, Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class Summed:
    """`kernel` computes each part."""

    kernel: Lowering = field(default_factory=Sdpa)

    @property
    def name(self) -> str:
        return f"summed-{self.kernel.name}"

    @property
    def host(self) -> str:
        return self.kernel.host

    @property
    def opset(self) -> int:
        return self.kernel.opset

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        refusal = first_refusal((bool(site.spec.plus), "nothing is added to this attention"), at=site.name)
        if refusal is not None:
            return refusal
        factors = [site.spec.gate.expr(0) if site.spec.gate is not None else None, *(c.expr(0) for c in site.spec.plus)]
        written = next((r for f in factors if (r := writable(f, site)) is not None), None)
        own = (self.kernel.supports(part, runtime) for part in parts(site))
        return written or next((r for r in own if r is not None), None)

    def emit(self, site: Site, builder: Builder) -> Value:
        layout, dtype = plain(site), site.q.value.dtype
        writer = Materializer(site, builder, dtype)
        shape = tuple(size_of(group) for group in layout)

        def scaled(part: Site, factor: Expr | None) -> Value:
            made = self.kernel.emit(part, builder)
            if factor is None:
                return made
            return builder.emit("mul", made, as_dtype(writer.write(factor), dtype, builder), shape=shape, dtype=dtype)

        first, *others = parts(site)
        total = scaled(first, None if site.spec.gate is None else site.spec.gate.expr(0))
        for part, clause in zip(others, site.spec.plus, strict=True):
            total = builder.emit("add", total, scaled(part, clause.expr(0)), shape=shape, dtype=dtype)
        return arrange(builder, Operand(total, layout), site.output.layout)


def plain(site: Site) -> Layout:
    a = site.axes
    return a["b"], (*a["g"], *a["r"]), a["q"], a["e"]


def parts(site: Site) -> list[Site]:
    """The attentions that are added, each as a site of its own that writes [B, H, Q, E]."""
    output = Operand(site.output.value, plain(site))
    own = replace(site, spec=site.spec.with_(gate=None, plus=()), output=output)
    return [own, *(added(own, clause) for clause in site.spec.plus)]


def added(site: Site, clause: Clause) -> Site:
    def read(name: str, otherwise: Operand) -> Operand:
        operand = clause.operand(name)
        return otherwise if operand is None else site.operands[operand]

    spec = clause.spec(1).with_(heads=site.spec.heads, width=site.spec.width)
    return replace(site, spec=spec, q=read("q", site.q), k=read("k", site.k), v=read("v", site.v))
