"""Which kernel is taken where none is measured: what is known of kernels in general, until something is known of the machine.

    softmax scale(0.125) causal                           on a GPU   ->   torch's kernels, which are tuned by hand for just this
    softmax scale(0.125) softcap(30.0) causal & window(512)          ->   the Triton kernel, which skips blocks and reads no mask

On a GPU the libraries compute softmax under no mask or a plain causal one as fast as anything does. Everything else they are given
as a tensor of scores' size, which takes them off their fast paths; FlexAttention skips blocks too, but compiles when it first runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.codegen import ON_GPU
from attnopt.codegen.library.flex import structured
from attnopt.codegen.lowering import Lowering
from attnopt.ir.expr import Term, conjuncts, operands
from attnopt.ir.site import Site


def predicted(site: Site, fits: Sequence[Lowering], kind: str) -> tuple[Lowering | None, str]:
    """The kernel for a site on a "cpu" or a "gpu" and why; None keeps the nodes. `fits` is not empty, the first is the default."""
    if kind == "gpu" and beyond_libraries(site):
        ours = next((x for x in fits if x in ON_GPU), None)
        if ours is not None:
            return ours, "predicted: the mask and the biases are computed in the kernel, and hidden blocks are never visited"
    if is_fused(site):
        return None, "one kernel already"
    return fits[0], "predicted: the score matrix never leaves the kernel"


def beyond_libraries(site: Site) -> bool:
    """Whether the spec says more than scaled_dot_product_attention takes without a mask tensor that could be an expression."""
    parts = conjuncts(site.spec.mask)
    known = [part for part in parts if not operands(part)]
    return structured(site) or (known == [Term("causal")] and len(parts) > 1)


def is_fused(site: Site) -> bool:
    """Whether the site was one attention node already."""
    return any(node.op == "attention" for node in site.nodes)
