"""Let each position see its neighbours: a window around it along one axis, or along both of an image.

    softmax scale(s)   ->   softmax scale(s) neighborhood(7, 1, 1, 14, 14) & neighborhood(7, 1, 1, 14, 1)        14 x 14 patches

Windows shift inward at the borders, so that every query sees as many keys. With dilation d neighbours stand d apart. A length that is a
square counts as an image, row by row; one more than a square as an image after a class token, which sees all and is seen by all.

Source: "Faster Neighborhood Attention: Reducing the O(n²) Cost of Self Attention at the Threadblock Level".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnopt.ir.expr import Expr, Index, apply, conjuncts, substitute
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import parse
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, proposed


@dataclass(frozen=True)
class Neighborhood:
    """Let each position see its neighbours: a window around it along one axis, or along both of an image.

    windows: (positions along an axis, dilation).
    """

    windows: tuple[tuple[int, int], ...] = ((13, 1), (7, 1), (7, 2))
    name: str = "neighborhood"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "NATTEN", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        length = site.size("k")
        if site.spec.mask is not None:
            return Refusal("a neighbourhood looks both ways: under a causal mask it is a window", site.name)
        if not isinstance(length, int):
            return Refusal(f"{length} keys: where a neighbourhood lies depends on the length", site.name)
        found = {kind: line for w, dilation in self.windows for kind, line in shapes(length, w, dilation).items()}
        return found or Refusal(f"the smallest neighbourhood covers all {length} keys", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)


def shapes(length: int, window: int, dilation: int) -> dict[str, str]:
    """The neighbourhoods of one size that a length has: in a line, and in an image."""
    found, apart = {}, f" {dilation} apart" * (dilation > 1)
    if window * dilation < length:
        found[f"{window} in a line{apart}"] = f"neighborhood({window}, {dilation}, 1, {length}, 1)"
    for tokens in (0, 1):
        side = math.isqrt(length - tokens)
        if side * side == length - tokens and window * dilation < side:
            found[f"{window} x {window} in an image{apart}"] = image(side, window, dilation, tokens)
    return found


def image(side: int, window: int, dilation: int, tokens: int) -> str:
    """The part of a mask for an image of side x side positions after so many tokens that are no part of it."""
    rows, columns = (f"neighborhood({window}, {dilation}, 1, {side}, {inner})" for inner in (side, 1))
    if not tokens:
        return f"{rows} & {columns}"
    mask = parse(f"softmax {rows} & {columns}").mask
    assert mask is not None
    moved: dict[str, Expr] = {name: apply("sub", Index(name), tokens) for name in ("q", "k")}
    inside = " & ".join(f"({substitute(part, moved)})" for part in conjuncts(mask))
    return f"(({inside}) | global({tokens}) | global_query({tokens}))"
