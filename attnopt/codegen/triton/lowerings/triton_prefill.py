"""softmax softcap(30.0) add(alibi) causal & window(512)   ->   attnopt::triton_attention(q, k, v, operands, spec)

The kernel of the family for many queries, emitted for this spec: blocks of keys that the mask rules out are never visited, and masks
and biases that are expressions are never in memory. It stands inside an operator of ours that carries the spec as text: loading such
a file needs `import attnopt`. The operator runs on GPUs; on CPU tensors it computes the reference, so that the model can be checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import call_operator
from attnopt.codegen.triton.prefill import supports
from attnopt.codegen.triton.site_kernels import form_of
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


@dataclass(frozen=True)
class TritonPrefill:
    name: str = "triton-prefill"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        absent = [name for name in site.spec.operands if name not in site.operands]
        refusal = first_refusal(
            (runtime == "torch", f"runtime {runtime} has no Triton kernels"),
            (not absent, f"{next(iter(absent), '')} is not known inside the kernel"),
            at=site.name,
        )
        form = form_of(site)
        return refusal or (form if isinstance(form, Refusal) else supports(site.spec, form))

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        return call_operator(torch.ops.attnopt.triton_attention.default, site, builder)
