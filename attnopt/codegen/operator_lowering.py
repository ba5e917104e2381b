"""Lowerings that put an operator of ours, which runs an emitted kernel, in the place of a site of a torch model.

    softmax softcap(30.0) causal & window(512)   ->   attnopt::tvm_attention(q, k, v, operands, spec)

The operator carries the spec as text: loading such a file needs `import attnopt`. The lowerings differ in the operator, in whose kernels
they are, and in what their family computes; those for few queries give the operator a cache in one piece, which is what the model holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.operator_call import cache_parts, call_operator
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.site_form import FEW, form_of
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class OperatorLowering(ABC):
    """operator: its name in torch.ops.attnopt. backend: whose kernels it runs. few: they are for few queries on a long cache.

    one: they are for one query alone.
    """

    name: str
    operator: str
    backend: str
    few: bool = False
    one: bool = False
    host: str = "torch"
    opset: int = 0

    @abstractmethod
    def refusal(self, spec: AttentionSpec, form: Form) -> Refusal | None:
        """What the family says of a spec and of what a kernel is compiled for."""

    def missing(self) -> str | None:
        """Why no kernel can be made here, in a line."""
        return None

    def form(self, site: Site) -> Form | Refusal:
        return form_of(site)

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        absent = [name for name in site.spec.operands if name not in site.operands]
        queries, missing = site.size("q"), self.missing()
        refused = first_refusal(
            (runtime == "torch", f"runtime {runtime} has no {self.backend} kernels"),
            (missing is None, missing or ""),
            (
                not self.few or (isinstance(queries, int) and queries <= FEW),
                f"{queries} queries; this kernel is for a number that is known to be at most {FEW}",
            ),
            (not self.one or queries == 1, f"{queries} queries; this kernel is for one"),
            (not absent, f"{next(iter(absent), '')} is not known inside the kernel"),
            at=site.name,
        )
        if refused is not None:
            return refused
        form = self.form(site)
        return form if isinstance(form, Refusal) else self.refusal(site.spec, form)

    def emit(self, site: Site, builder: Builder) -> Value:
        import torch

        import attnopt.operators  # noqa: F401  (registers the operator)

        operator = getattr(torch.ops.attnopt, self.operator).default
        return call_operator(operator, site, builder, cache_parts(site) if self.few else ())
