"""One kernel at one shape as a call that can be timed: the way in which `optimize` would run it.

    Point("softmax scale(0.125) causal", {b: 1, h: 8, g: 8, q: 512, k: 512, d: 64, e: 64}, "ort-gqa")   ->   a callable

The kernel is written into a model of one attention by its own lowering and cut out of it, so that what is measured is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from attnopt.codegen import ON_CPU, SINGLE
from attnopt.codegen.lowering import Lowering
from attnopt.codegen.spelled_out import SpelledOut
from attnopt.cost.kernels import phases
from attnopt.cost.phase import Phase
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.hosts.fx import FxHost
from attnopt.hosts.onnx import OnnxHost
from attnopt.hosts.single_attention import OPSET, example, single_attention
from attnopt.ir.layout import Layout, Operand
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import parse
from attnopt.patterns import recognise
from attnopt.plan.choose import bind, boundary, emit

KERNELS: dict[str, Lowering] = {x.name: x for x in (*SINGLE, *ON_CPU[:2], SpelledOut("torch"), SpelledOut("onnx"))}
RUNTIMES = {"torch": "torch", "onnx": "onnxruntime"}
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Point:
    """A spec line, a shape (b, h, g, q, k, d, e) and the name of a kernel; specs may load `padding` and `bias`."""

    spec: str
    sizes: Sizes
    kernel: str
    dtype: str = "float32"

    @property
    def shape(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def line(self) -> tuple[str, Sizes]:
        """What it shares with the points of other kernels, which are timed in turn with it."""
        return self.spec, self.sizes

    def passes(self, target: Target) -> list[Phase]:
        """What the kernel does, for the cost model."""
        return phases(self.kernel, Problem(parse(self.spec), self.shape, self.dtype), target)

    def __str__(self) -> str:
        return f"{self.kernel}: {self.spec} {self.dtype} " + " ".join(f"{axis}={size}" for axis, size in self.sizes)


def point(spec: str, shape: Mapping[str, int], kernel: str, dtype: str = "float32") -> Point:
    return Point(spec, tuple((axis, shape[axis]) for axis in "bhgqkde"), kernel, dtype)


@lru_cache(maxsize=4)  # the kernels of one shape come one after the other
def opened(host: str, sizes: Sizes, dtype: str) -> FxHost | OnnxHost:
    return single_attention(host, dict(sizes), dtype)


def under_spec(host: FxHost | OnnxHost, spec: str) -> Site:
    """The one attention of the host, as if it were the spec's."""
    (site,) = recognise(host.graph).sites
    a, values = site.axes, {value.name: value for value in host.graph.inputs}
    layouts: dict[str, Layout] = {"padding": (a["b"], a["k"]), "bias": ((), (*a["g"], *a["r"]), a["q"], a["k"])}
    operands = {name: Operand(values[name], layout) for name, layout in layouts.items()}
    return replace(site, operands=operands, tensor_form=None).with_step("spec", parse(spec))


def refusal(of: Point) -> Refusal | None:
    """Why the kernel cannot compute the point; None where it can."""
    lowering = KERNELS[of.kernel]
    site = under_spec(opened(lowering.host, of.sizes, of.dtype), of.spec)
    said = lowering.supports(site, RUNTIMES[lowering.host])
    return said or (Refusal(f"needs opset {lowering.opset}") if lowering.opset > OPSET else None)


def call(of: Point) -> Callable[[], object]:
    """The kernel on random data. Raises what its runtime raises."""
    lowering = KERNELS[of.kernel]
    trial = opened(lowering.host, of.sizes, of.dtype).copy()
    site = under_spec(trial, of.spec)
    read = boundary(site)
    result = emit(trial, site, lowering)
    data = trial.tap(read, example(of.shape, of.dtype))
    return bind(trial.isolate(read, [result]), data)


def ready(group: Iterable[Point], failed: Callable[[Point, str], None]) -> dict[Point, Callable[[], object]]:
    """The points of one line that their kernels can compute, as calls; a kernel that breaks is told and left out."""
    calls: dict[Point, Callable[[], object]] = {}
    for each in group:
        if refusal(each) is not None:
            continue
        try:
            made = call(each)
            made()
        except Exception as failure:  # whatever a runtime or a compiler throws
            failed(each, str(failure).splitlines()[0] if str(failure) else type(failure).__name__)
        else:
            calls[each] = made
    return calls
