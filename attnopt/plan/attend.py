"""An attention as plain nodes, for passes that write a whole block anew: whatever kernel suits it then is chosen afterwards.

torch   aten.scaled_dot_product_attention where it computes the spec, else products and a softmax
onnx    MatMul, Add, Softmax, MatMul at any opset
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.lowering import Lowering
from attnopt.codegen.spelled_out import SpelledOut
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


@dataclass(frozen=True)
class PlainAttention:
    """`host` is "torch" or "onnx"."""

    host: str

    @property
    def kernels(self) -> tuple[Lowering, ...]:
        return (Sdpa(), SpelledOut("torch")) if self.host == "torch" else (SpelledOut("onnx"),)

    def kernel(self, site: Site) -> Lowering | Refusal:
        refusals = []
        for kernel in self.kernels:
            refusal = kernel.supports(site, self.host)
            if refusal is None:
                return kernel
            refusals.append(refusal)
        return refusals[-1]

    def refuses(self, site: Site) -> Refusal | None:
        found = self.kernel(site)
        return found if isinstance(found, Refusal) else None

    def __call__(self, site: Site, builder: Builder) -> Value:
        """Raises RuntimeError for a spec that no plain nodes compute."""
        found = self.kernel(site)
        if isinstance(found, Refusal):
            raise RuntimeError(f"'{site.name}' cannot be written anew: {found.reason}")
        return found.emit(site, builder)
