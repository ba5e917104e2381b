"""softmax scale(s) mix(m) add(…) weight_mix(w)   ->   matmul, conv(scores, m), softmax, conv(weights, w), matmul

Every head waits for all others twice, so no library kernel computes the whole. The nodes that do are written with heads as the
channels of a convolution of one place, which moves no score: layers over the last dimension move all of them twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import Materializer, as_dtype, writable
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const
from attnopt.ir.graph import Value
from attnopt.ir.layout import Layout, Operand, size_of
from attnopt.ir.site import Builder, Refusal, Site, arrange

CONVOLUTIONS = {"torch": torch.ops.aten.conv2d.default, "onnx": "::Conv"}
TERMS = ("scale", "softcap", "add", "mix")


@dataclass(frozen=True)
class HeadMixing:
    host: str = "torch"

    @property
    def name(self) -> str:
        return "head-mixing" if self.host == "torch" else f"{self.host}-head-mixing"

    @property
    def opset(self) -> int:
        return 0 if self.host == "torch" else 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        spec = site.spec
        other = [c.name for c in spec.score if c.name not in TERMS] + [c.name for c in spec.weighting if c.name != "weight_mix"]
        special = [slot for slot in spec.special if slot not in ("weighting", "offset")]
        refusal = first_refusal(
            (mixes(site), "no mix across heads"),
            (spec.normalizer.name == "softmax", f"the normaliser is {spec.normalizer}, not softmax"),
            (not special, f"{special[:1]} is not part of this kernel"),
            (not other, f"{other[:1]} is not part of this kernel"),
            (isinstance(site.size("h"), int), "the number of heads is not known"),
            at=site.name,
        )
        said = [c.expr(0) for c in spec.score if c.name in ("scale", "add")]
        plain = replace(site, tensor_form=None)
        return refusal or next((r for e in (*said, spec.mask) if (r := writable(e, plain)) is not None), None)

    def emit(self, site: Site, builder: Builder) -> Value:
        return Composition(replace(site, tensor_form=None), builder, self.host).write()


def mixes(site: Site) -> bool:
    return any(c.name == "mix" for c in site.spec.score) or any(c.name == "weight_mix" for c in site.spec.weighting)


@dataclass
class Composition:
    """Writes the nodes of one site, scores and weights as [B, H, Q, K]."""

    site: Site
    builder: Builder
    host: str

    def write(self) -> Value:
        site, a, builder, dtype = self.site, self.site.axes, self.builder, self.site.q.value.dtype
        heads = (*a["g"], *a["r"])
        self.shape = tuple(map(size_of, (a["b"], heads, a["q"], a["k"])))
        self.writer = Materializer(site, builder, dtype)
        q = arrange(builder, site.q, [a["b"], heads, a["q"], a["d"]], broadcast=True)
        k = arrange(builder, site.k, [a["b"], heads, a["d"], a["k"]], broadcast=True)
        v = arrange(builder, site.v, [a["b"], heads, a["k"], a["e"]], broadcast=True)
        terms = list(site.spec.score)
        if terms and terms[0].name == "scale" and isinstance(terms[0].args[0], Const):
            q = self.scaled(q, float(terms.pop(0).args[0].value))  # type: ignore[union-attr]
        scores = builder.emit("matmul", q, k, shape=self.shape, dtype=dtype)
        for clause in terms:
            scores = self.term(clause, scores)
        visible = None if site.spec.mask is None else self.writer.write(site.spec.mask)
        if visible is not None:
            scores = self.chosen(visible, scores, torch.finfo(getattr(torch, dtype)).min / 2)
        weights = builder.emit("softmax", scores, shape=self.shape, dtype=dtype, axis=3)
        if visible is not None and site.spec.empty_row == "zero":
            weights = self.chosen(visible, weights, 0.0)
        for clause in site.spec.weighting:
            weights = self.mixed(clause, weights)
        layout: Layout = (a["b"], heads, a["q"], a["e"])
        out = builder.emit("matmul", weights, v, shape=tuple(map(size_of, layout)), dtype=dtype)
        return arrange(builder, Operand(out, layout), site.output.layout)

    def term(self, clause: Clause, scores: Value) -> Value:
        if clause.name == "mix":
            return self.mixed(clause, scores)
        if clause.name == "softcap":
            cap = clause.number(0)
            squashed = self.builder.emit("tanh", self.scaled(scores, 1.0 / cap), shape=self.shape, dtype=scores.dtype)
            return self.scaled(squashed, cap)
        said = as_dtype(self.writer.write(clause.expr(0)), scores.dtype, self.builder)
        op = {"scale": "mul", "add": "add"}[clause.name]
        return self.builder.emit(op, scores, said, shape=self.shape, dtype=scores.dtype)

    def mixed(self, clause: Clause, x: Value) -> Value:
        heads = self.shape[1]
        matrix = self.site.operands[clause.word(0)].value
        kernel = self.builder.emit("reshape", matrix, shape=(heads, heads, 1, 1), dtype=matrix.dtype)
        named = clause.operand("bias") if clause.name == "weight_mix" else None
        bias = None if named is None else self.site.operands[named].value
        return self.builder.call(CONVOLUTIONS[self.host], x, kernel, bias, shape=self.shape, dtype=x.dtype)

    def scaled(self, x: Value, factor: float) -> Value:
        number = self.builder.constant(factor, x.dtype)
        return self.builder.emit("mul", x, number, shape=x.shape or (), dtype=x.dtype)

    def chosen(self, visible: Value, x: Value, otherwise: float) -> Value:
        fill = self.builder.constant(otherwise, x.dtype)
        return self.builder.emit("where", visible, x, fill, shape=self.shape, dtype=x.dtype)
