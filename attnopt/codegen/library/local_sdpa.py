"""softmax heads(8, 2) scale(s) causal & window(512) & padding   ->   attnopt::local_attention(q, k, v, operands, spec)

torch's scaled_dot_product_attention on chunks of queries, each beside the keys that the mask's band reaches. Against FlexAttention
it needs no compiler, starts at once and averages empty rows where the spec says so; FlexAttention has soft caps. Like FlexAttention
it stands inside an operator of ours that carries the spec as text: loading such a file needs `import attnopt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.additive_mask import scaled_then_biased
from attnopt.codegen.local_writer import worth_chunks
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import call_operator
from attnopt.ir.expr import Load, Size, walk
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


@dataclass(frozen=True)
class LocalSdpa:
    name: str = "local-sdpa"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        parts = [e for x in (site.spec.mask, *site.spec.biases) if x is not None for e in walk(x)]
        unknown = [str(e) for e in parts if isinstance(e, Size) and e.name not in "qk"]
        unknown += [e.operand for e in parts if isinstance(e, Load) and e.operand not in site.operands]
        return (
            first_refusal(
                (runtime == "torch", f"runtime {runtime} has no scaled_dot_product_attention"),
                at=site.name,
            )
            or worth_chunks(site)
            or first_refusal((not unknown, f"{next(iter(unknown), '')} is not known inside the kernel"), at=site.name)
            or scaled_then_biased(site)
        )

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.runtime.local  # noqa: F401  (registers the operator)

        return call_operator(torch.ops.attnopt.local_attention.default, site, builder)
