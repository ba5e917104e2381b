"""Predicted time of one attention or one linear layer on a target, with what bounds it in words.

    estimate("softmax causal", {b: 1, h: 32, g: 8, q: 1, k: 32768, d: 128, e: 128}, "bfloat16", "sdpa", h200)
        ->  Estimate(seconds=3.9e-05, …, bound="memory", why="bound by memory: 134 MB at 4.8 TB/s")

Every kernel is a list of phases (`kernels`), every phase is priced by the roofline (`phase`) with the shares that the target's kernels
reach (`efficiency`). Rates come from the target's data, so that a plan for a machine can be made on another; a `cpu` that was never
calibrated is measured in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from attnopt.cost.kernels import phases
from attnopt.cost.machine import rated
from attnopt.cost.phase import Parts, Phase, features, priced
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.ir.cost import WIDTHS
from attnopt.ir.spec import AttentionSpec, as_spec
from attnopt.rounding.weight_format import WeightFormat

SUMMED = "summed-"  # prefix of the lowering that computes each added attention with one kernel
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Estimate:
    """seconds: of one call. flops, bytes: computed and moved by the kernel as it works, not the least that would do.

    working_set: the most bytes that a pass goes through. bound: "products", "scores", "memory" or "launch"; why: the same in words.
    """

    seconds: float
    flops: float
    bytes: float
    working_set: float
    bound: str
    why: str

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other; what bounds the longer bounds the sum."""
        longer = self if self.seconds >= other.seconds else other
        return Estimate(self.seconds + other.seconds, self.flops + other.flops, self.bytes + other.bytes,
                        max(self.working_set, other.working_set), longer.bound, longer.why)  # fmt: skip

    def __mul__(self, weight: float) -> Estimate:
        """So many calls, or a share of one."""
        return replace(self, seconds=self.seconds * weight, flops=self.flops * weight, bytes=self.bytes * weight)


NOTHING = Estimate(0.0, 0.0, 0.0, 0.0, "launch", "nothing is computed")


def estimate(
    spec: AttentionSpec | str,
    shape: Mapping[str, int],
    dtype: str = "float32",
    kernel: str = "sdpa",
    *,
    target: Target,
    surrounding: float = 0.0,
    heads_first: bool = True,
    held_mask: bool = False,
) -> Estimate:
    """The price of one call of a kernel, named as in reports ("sdpa", "flex", "ort-gqa", "triton-prefill", "eager", …).

    shape: b, h, g (query, key heads), q, k (lengths), d, e (key, value width).
    surrounding: bytes that the model goes through between two calls, which push keys and values out of the caches.
    heads_first: q, k and v arrive as [B, H, L, D], not as [B, L, H, D]. held_mask: the graph holds the mask as a tensor already.
    """
    spec = as_spec(spec)
    known = {"target": target, "surrounding": surrounding, "heads_first": heads_first, "held_mask": held_mask}
    if kernel.startswith(SUMMED) or spec.plus:
        single = kernel.removeprefix(SUMMED)
        own = estimate(spec.with_(plus=(), gate=None), shape, dtype, single, **known)  # type: ignore[arg-type]
        return sum((estimate(c.spec(1), shape, dtype, single, **known) for c in spec.plus), own)  # type: ignore[arg-type]
    problem = Problem(spec, dict(shape), dtype, heads_first, held_mask)
    passes = [replace(p, working_set=p.working_set + surrounding) for p in phases(kernel, problem, target)]
    return of_phases(passes, problem.product_type, target)


def estimate_linear(
    rows: int,
    n: int,
    m: int,
    dtype: str = "float32",
    weights: str = "",
    *,
    target: Target,
    runtime: str = "",
    surrounding: float = 0.0,
) -> Estimate:
    """A linear layer on `rows` rows, n inputs, m outputs, its weights stored as `weights` ("int8", "int4", …; default as `dtype`).

    Narrow weights are computed in int8 where the target has a rate for it, after a pass that quantises the inputs. Weights in a
    format ("int4 group 32") are made whole for each call, but by onnxruntime. For a runtime with kernels of its own, its name.
    """
    return of_phases(linear_phases(rows, n, m, dtype, weights, runtime, surrounding), dtype, target)


def linear_phases(
    rows: int, n: int, m: int, dtype: str, weights: str = "", runtime: str = "", surrounding: float = 0.0
) -> list[Phase]:
    """The passes of a linear layer: what its inputs need before, and the product."""
    if (format := WeightFormat.read(weights)) is not None:
        return rounded_phases(rows, n, m, dtype, format, runtime, surrounding)
    width, stored = WIDTHS[dtype] / 8, WIDTHS[weights or dtype] / 8
    narrow = bool(weights) and stored < min(width, 2.0)
    name = ("ort-" if runtime == "onnxruntime" else "") + ("linear-int8" if narrow else "linear")
    inside = rows * n * width
    once = inside + rows * m * width + n * m * stored
    # One row is no product: the weights are read once, and memory bounds it.
    product = Phase("products", name, flops=2.0 * rows * n * m, operations=2.0 * rows * m * narrow, bytes=once,
                    working_set=once + surrounding, rows=rows if rows > 1 else math.inf, dtype="int8" if narrow else "")  # fmt: skip
    if not narrow:
        return [product]
    return [Phase("quantise", f"{name}-inputs", operations=4.0 * rows * n, bytes=2 * inside, working_set=inside), product]


def rounded_phases(rows: int, n: int, m: int, dtype: str, format: WeightFormat, runtime: str, surrounding: float) -> list[Phase]:
    """A linear layer whose weights stand in a format: onnxruntime multiplies 8-bit inputs by them, torch makes them whole first."""
    width, stored = WIDTHS[dtype] / 8, n * m * format.width(n) / 8
    if runtime == "onnxruntime":
        once = rows * (n + m) * width + stored
        return [Phase("products", f"ort-linear-{format.bits}bits", flops=2.0 * rows * n * m, operations=4.0 * rows * n, bytes=once,
                      working_set=once + surrounding, rows=rows if rows > 1 else math.inf, dtype="int8")]  # fmt: skip
    made = stored + n * m * width
    unpack = Phase("weights made whole", "linear-whole", operations=4.0 * n * m, bytes=made, working_set=made + surrounding)
    return [unpack, *linear_phases(rows, n, m, dtype, "", runtime, surrounding)]


def estimate_pass(elements: float, dtype: str = "float32", *, target: Target, operands: int = 1, runtime: str = "") -> Estimate:
    """One node that reads `operands` tensors of so many elements and writes one: a norm, an addition, a rotation."""
    moved = elements * (operands + 1) * WIDTHS.get(dtype, 32) / 8
    name = "ort-elementwise" if runtime == "onnxruntime" else "elementwise"
    return of_phases([Phase("pass", name, operations=elements, bytes=moved, working_set=moved)], dtype, target)


def of_phases(passes: Sequence[Phase], dtype: str, target: Target) -> Estimate:
    """The sum over the passes of one kernel. dtype: of products that do not say theirs."""
    if not passes:
        return NOTHING
    target = rated(target)
    parts = [priced(features(p, dtype, target), target.efficiency(p.family), target.launch) for p in passes]
    spent = {name: sum(getattr(p, name) for p in parts) for name in ("products", "scores", "memory", "launch")}
    bound = max(spent, key=spent.__getitem__)
    return Estimate(
        seconds=float(sum(p.total for p in parts)),
        flops=sum(p.flops + p.more + p.operations for p in passes),
        bytes=sum(p.bytes + p.rereads for p in passes),
        working_set=max(p.working_set for p in passes),
        bound=bound,
        why=WORDS[bound](passes, parts, dtype, target),
    )


def spoken(value: float, unit: str) -> str:
    """134217728 bytes -> "134 MB"."""
    scale, letter = next(((s, n) for s, n in UNITS if value >= 0.9995 * s), (1.0, ""))
    return f"{value / scale:.3g} {letter}{unit}"


def products(passes: Sequence[Phase], parts: Sequence[Parts], dtype: str, target: Target) -> str:
    flops, spent = sum(p.flops + p.more for p in passes), sum(p.products for p in parts)
    dtype = " and ".join(dict.fromkeys([dtype, *(p.more_dtype for p in passes if p.more)]))
    return f"bound by products: {spoken(flops, 'FLOP')} at {spoken(flops / spent, 'FLOP/s')} ({dtype})"


def scores(passes: Sequence[Phase], parts: Sequence[Parts], dtype: str, target: Target) -> str:
    done, spent = sum(p.operations for p in passes), sum(p.scores for p in parts)
    return f"bound by work on scores: {spoken(done, 'operations')} at {spoken(done / spent, '/s')}"


def memory(passes: Sequence[Phase], parts: Sequence[Parts], dtype: str, target: Target) -> str:
    """The pass that moves longest, at the rate that it reaches."""
    at = max(range(len(parts)), key=lambda i: parts[i].memory)
    moved = passes[at].bytes + passes[at].rereads
    place = "the caches" if target.cache >= passes[at].working_set > 0 else "memory"
    return f"bound by {place}: {spoken(moved, 'B')} of {passes[at].what} at {spoken(moved / parts[at].memory, 'B/s')}"


def launch(passes: Sequence[Phase], parts: Sequence[Parts], dtype: str, target: Target) -> str:
    calls = sum(p.launches for p in passes)
    return f"bound by launches: {calls:.0f} of {sum(p.launch for p in parts) / calls * 1e6:.3g} us"


WORDS: dict[str, Callable[[Sequence[Phase], Sequence[Parts], str, Target], str]] = {
    "products": products, "scores": scores, "memory": memory, "launch": launch,
}  # fmt: skip
