"""softmax softcap(30.0) add(alibi) causal & window(512)   ->   attnopt::flex_attention(q, k, v, operands, spec)

FlexAttention takes what scaled_dot_product_attention cannot: soft caps, terms in any order, masks as expressions that skip
whole blocks. torch.export cannot save it, so it stands inside an operator of ours that carries the spec as text:
loading such a file needs `import attnopt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.additive_mask import plain_softmax
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import call_operator
from attnopt.ir.empty_rows import never_empty
from attnopt.ir.expr import Const, Expr, Term, conjuncts, operands
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.runtime.flex_source import NARROWEST, compiler_at_hand, sayable


@dataclass(frozen=True)
class Flex:
    name: str = "flex"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        spec = site.spec
        return first_refusal(
            (runtime == "torch", f"runtime {runtime} has no FlexAttention"),
            (site.q.value.dtype in ("float32", "float16", "bfloat16"), f"dtype {site.q.value.dtype}"),
            (spec.empty_row != "mean" or never_empty(site), "empty rows must average the values; FlexAttention returns zero"),
            (compiler_at_hand(), "FlexAttention needs a C++ compiler (install g++), and none was found"),
            (narrowest(site) >= NARROWEST, f"FlexAttention needs heads of at least {NARROWEST} channels"),
            (spec.offset is None, "queries do not start at position 0"),
            (sayable(spec), "a score term or a length that FlexAttention cannot say"),
            (structured(site), "nothing here that FlexAttention does better than scaled_dot_product_attention"),
            at=site.name,
        ) or plain_softmax(site)

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.runtime.flex  # noqa: F401  (registers the operator)

        return call_operator(torch.ops.attnopt.flex_attention.default, site, builder)


def narrowest(site: Site) -> int:
    """Channels per head of q and v, the smaller; unknown ones count as enough."""
    widths = [site.size(axis) for axis in "de"]
    return min((w for w in widths if isinstance(w, int)), default=NARROWEST)


def structured(site: Site) -> bool:
    """Whether the spec has a soft cap, a computed bias, or a mask that leaves whole blocks out."""
    spec = site.spec
    computed = any(not operands(b) for b in spec.biases if not isinstance(b, Const))
    return any(c.name in ("softcap", "mod") for c in spec.score) or computed or skips_blocks(spec.mask)


def skips_blocks(mask: Expr | None) -> bool:
    """Whether some part of the mask is known without data (causal alone is left to kernels that have it built in)."""
    known = [p for p in conjuncts(mask) if not operands(p)]
    return bool(known) and known != [Term("causal")]
