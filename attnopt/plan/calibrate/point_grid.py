"""The shapes and specs on which kernels are measured: one fixed list, from one token to a few thousand, so that two runs compare.

points()   ->   every kernel at every (spec, shape) that it can compute and that is done in some milliseconds
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from attnopt.plan.calibrate.kernel_points import KERNELS, Point, point

# batch, query heads, key heads, queries, keys, width
Shape = tuple[int, int, int, int, int, int]
PREFILL: tuple[Shape, ...] = (
    (1, 8, 8, 32, 32, 64), (1, 12, 12, 64, 64, 32), (1, 8, 2, 96, 96, 64), (8, 4, 4, 64, 64, 32), (1, 8, 8, 128, 128, 64),
    (1, 12, 12, 128, 128, 32), (4, 4, 4, 128, 128, 64), (1, 16, 4, 160, 160, 80), (1, 8, 8, 192, 192, 64), (1, 8, 2, 256, 256, 64),
    (2, 6, 6, 256, 256, 32), (1, 4, 4, 320, 320, 128), (1, 8, 8, 384, 384, 32), (1, 4, 1, 512, 512, 64), (1, 12, 12, 512, 512, 32),
    (1, 4, 4, 640, 640, 64), (1, 4, 2, 768, 768, 32), (1, 2, 2, 896, 896, 128), (1, 2, 1, 1024, 1024, 64), (1, 2, 2, 1536, 1536, 32),
)  # fmt: skip
DECODE: tuple[Shape, ...] = (
    (1, 8, 8, 1, 128, 64), (1, 8, 8, 1, 512, 64), (1, 8, 2, 1, 1024, 64), (1, 8, 8, 1, 2048, 64), (4, 8, 8, 1, 256, 64),
    (4, 8, 2, 1, 1024, 64), (1, 16, 4, 1, 2048, 128), (1, 32, 8, 1, 512, 128), (1, 8, 8, 1, 8192, 64), (1, 4, 4, 1, 16384, 128),
    (8, 4, 4, 1, 512, 32), (1, 8, 8, 16, 512, 64), (1, 4, 4, 48, 1024, 32), (2, 8, 8, 4, 256, 64),
    (1, 32, 8, 1, 2048, 64), (2, 16, 4, 1, 4096, 64), (1, 16, 2, 1, 1024, 64), (8, 8, 2, 1, 512, 64),
)  # fmt: skip
BIASED = "add(load(bias, 0, h, row, k))"
WHOLE = ("", "causal", "padding", BIASED, "causal & padding")  # for prompts
BANDED = (
    "causal & window(64)",
    "causal & window(64) & padding",
    "causal & window(200)",
    "window(33) & lookahead(32)",
    "chunk(64)",
)
FLEXIBLE = ("softcap(30.0) causal", "causal & window(128)")
FLEX_LENGTHS = (192, 320, 512, 768, 1024)
LATE = ("", "padding")  # for few queries on many keys: the kernels' causal masks count from the first key
TVM_WIDTH = 64  # TVM compiles each line for a second or more: of one width it has points enough
FEWEST = 192  # queries from which a band is worth anything


def shape_of(given: Shape) -> dict[str, int]:
    b, h, g, q, k, d = given
    return {"b": b, "h": h, "g": g, "q": q, "k": k, "d": d, "e": d}


def lines() -> Iterator[tuple[str, dict[str, int]]]:
    """Spec lines with shapes, without kernels."""
    for given, rest in [*((x, WHOLE) for x in PREFILL), *((x, LATE) for x in DECODE)]:
        shape = shape_of(given)
        masks = [*rest, *(BANDED if shape["q"] == shape["k"] >= FEWEST else ())]
        for mask in masks:
            yield f"softmax scale({shape['d'] ** -0.5:.7g}) {mask}".strip(), shape


def flex_lines() -> Iterator[tuple[str, dict[str, int]]]:
    """FlexAttention compiles each line for seconds, and anew for other heads: few lines of one width and head count, on some lengths."""
    for length in FLEX_LENGTHS:
        for mask in FLEXIBLE:
            yield f"softmax scale(0.125) {mask} empty(zero)", shape_of((1, 4, 4, length, length, 64))


def compiles_soon(kernel: str, shape: dict[str, int]) -> bool:
    return not kernel.startswith("tvm") or shape["d"] == TVM_WIDTH


def share(line: str, shape: dict[str, int], of: int) -> int:
    """0 … of - 1: the same for all kernels of a line, at every run and everywhere."""
    return hashlib.sha256(f"{line} {sorted(shape.items())}".encode()).digest()[0] % of


def groups(*, flex: bool = True, kernels: Sequence[str] = tuple(KERNELS)) -> Iterator[list[Point]]:
    """The points of one line after the other; whether a kernel can compute one is asked when it is measured."""
    for line, shape in lines():
        yield [point(line, shape, kernel) for kernel in kernels if kernel != "flex" and compiles_soon(kernel, shape)]
    if flex:
        for line, shape in flex_lines():
            yield [point(line, shape, "flex")]
