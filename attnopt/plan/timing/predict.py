"""The times of a site's kernels and of the nodes that it has, as the cost model predicts them for a target.

    predicted(site, [Sdpa(), LocalSdpa()], target, [(1.0, shape)])   ->   {"original": Estimate, "sdpa": …, "local-sdpa": …}

A plan for several shapes minimises the weighted sum. What one node computes already stays unless a kernel is predicted to gain
clearly: the model errs by some tenths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attnopt.codegen.additive_mask import held
from attnopt.codegen.lowering import Lowering
from attnopt.cost.estimate import NOTHING, SUMMED, Estimate, estimate
from attnopt.cost.kernels import KERNELS
from attnopt.cost.target import Target
from attnopt.ir.dims import evaluate
from attnopt.ir.site import Host, Site
from attnopt.report.data import ORIGINAL

Shapes = Sequence[tuple[float, Mapping[str, int]]]  # weights, and b, h, g, q, k, d, e
DOUBT = 0.25  # what a kernel must be predicted to gain over an attention that is one node already
SPELLED_OUT = {"torch": "eager", "onnx": "ort-eager"}
ONE_NODE = {"torch": "sdpa", "onnx": "onnx-attention"}


def predicted(
    site: Site, lowerings: Sequence[Lowering], target: Target, shapes: Shapes, *, host: str = "torch"
) -> dict[str, Estimate]:
    """Weighted sums over the shapes, by name of the kernel; `original` is the site as it stands in a host ("torch", "onnx")."""
    fused = any(node.op == "attention" for node in site.nodes)
    spelled = SPELLED_OUT[host]  # and what stands for a kernel that the cost model does not know
    names = {x.name: x.name if x.name.removeprefix(SUMMED) in KERNELS else spelled for x in lowerings}
    names = {ORIGINAL: ONE_NODE[host] if fused else spelled, **names}
    return {name: weighted(site, kernel, target, shapes) for name, kernel in names.items()}


def weighted(site: Site, kernel: str, target: Target, shapes: Shapes) -> Estimate:
    """One kernel over all shapes: seconds, operations and bytes count by weight."""
    first, mask = heads_first(site), held(site)
    total = NOTHING
    for weight, shape in shapes:
        dtype = site.q.value.dtype or "float32"
        total = total + estimate(site.spec, shape, dtype, kernel, target=target, heads_first=first, held_mask=mask) * weight
    return total


def heads_first(site: Site) -> bool:
    """Whether the heads of queries stand before their positions."""
    order = [axis for group in site.q.layout for axis in group]
    rows = [order.index(axis) for axis in site.axes["q"] if axis in order]
    return not rows or all(order.index(axis) < rows[0] for axis in (*site.axes["g"], *site.axes["r"]) if axis in order)


def example_shapes(host: Host, site: Site, inputs: Mapping[str, Tensor]) -> Shapes:
    """The site at the example inputs; none where a length is only known when the model runs."""
    return shapes_at(site, [(1.0, host.graph.sizes(inputs))])


def shapes_at(site: Site, loads: Sequence[tuple[float, Mapping[str, int]]]) -> Shapes:
    """The site at weighted values of the model's symbolic sizes; none where a length is only known when the model runs."""
    try:
        return [(weight, {axis: evaluate(dim, sizes) for axis, dim in site.shape.items()}) for weight, sizes in loads]
    except KeyError:
        return []


def best(site: Site, times: Mapping[str, Estimate]) -> tuple[str, str]:
    """The kernel to take ("original" for none) and why. A tie goes to a kernel, which also saves the score matrix."""
    before = times[ORIGINAL]
    name = min((n for n in times if n != ORIGINAL), key=lambda n: times[n].seconds)
    ratio = times[name].seconds / before.seconds
    fused = any(node.op == "attention" for node in site.nodes)
    said = f"predicted {1 / ratio:.2f}x the original's speed ({times[name].why})"
    if ratio <= (1.0 - DOUBT if fused else 1.0):
        return name, said
    return ORIGINAL, f"one kernel already; the best other, {name}, is {said}" if fused else f"{name} is {said}: kept as it was"
