"""Normalised queries and keys in a kernel: what multiplies the channels of a query, and how large a score can become.

    norm(rms, q_gain=g, k_gain=f) scale(0.125)   ->   channel_factor: 0.125 * g[h, d] * f[key_head, d]
                                                      |score| <= 0.125 * width * max|g| * max|f|

Both rows have a norm of at most one (or the root of the width) before their gains, so Cauchy and Schwarz bound the product; a
softcap bounds whatever comes before it. Where a score is at most B, weights may be exp(score) itself, with the constant 0 in the
place of the largest score of a row: no running maximum, no rescaling. It is exact where

- no weight overflows, nor the sum of 2^31 of them with values of 2^48: B log2(e) <= 48 in float32 (48 + 31 + 48 <= 127);
- no weight is lost that would count: the largest of a row is at least 2^-48, what is 2^-24 of it at least 2^-72, and it is normal in
  float32 times any value down to 2^-54;
- weights that are rounded to float16 stay normal numbers of it: B log2(e) <= 14, where bfloat16 has the range of float32.
"""

from __future__ import annotations

import math

from attnopt.codegen.triton.expressions import pointer
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Const
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec

BITS = {"float16": 14.0, "bfloat16": 48.0, "float32": 48.0}
NORMS = {"rms": "rms", "layer": "rms", "l2": "l2"}
ROUNDED = 1.02  # a normalised query is rounded to half precision before the product: no channel grows by more


def refusal(spec: AttentionSpec) -> Refusal | None:
    if spec.qk_norm is not None and spec.qk_norm.word(0) not in NORMS:
        return Refusal(f"{spec.qk_norm} depends on all rows of a head", spec.qk_norm)
    return None


def normed(norm: Clause | None, side: str) -> bool:
    return norm is not None and norm.word("on") in ("both", side)


def gains(norm: Clause | None) -> dict[str, str]:
    """The operands that multiply channels, by side."""
    found = {side: norm.operand(f"{side}_gain") for side in "qk" if normed(norm, side)} if norm is not None else {}
    return {side: name for side, name in found.items() if name is not None}


def factor_line(norm: Clause | None, factor: float, padded: bool) -> str:
    """What `channel_factor` returns: the constant, and each gain [heads, width]."""
    mask = ", mask=d < D, other=0.0" if padded else ""
    parts = [repr(factor)]
    for side, name in gains(norm).items():
        p, head = pointer(name), "h" if side == "q" else "key_head"
        parts.append(f"tl.cast(tl.load({p} + {head} * s_{p[2:]}_0 + d * s_{p[2:]}_1{mask}), tl.float32)")
    return f"return {' * '.join(parts)}"


def gain_arguments(norm: Clause | None) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each gain the parameters of the kernel, and what is passed: [width], [heads, width] or [heads, 1] read alike."""
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for name in gains(norm).values():
        x = pointer(name)[2:]
        steps = (f"{x}.stride(0) if {x}.ndim > 1 else 0", f"{x}.stride(-1) if {x}.shape[-1] > 1 else 0")
        found[name] = ((pointer(name), f"s_{x}_0", f"s_{x}_1"), (x, *steps))
    return found


def score_bound(spec: AttentionSpec, width: int, limits: dict[str, float]) -> float:
    """The largest magnitude of a score after all terms; infinity where nothing bounds it. limits: of the gains, by name."""
    bound, norm = math.inf, spec.qk_norm
    if norm is not None and normed(norm, "q") and normed(norm, "k") and norm.word(0) in NORMS:
        bound = ROUNDED * (1.0 if norm.word(0) == "l2" else width)
        bound *= math.prod(limits.get(name, math.inf) for name in gains(norm).values())
    for term in spec.score:
        if term.name == "softcap":
            cap = abs(term.number(0))
            bound = cap * math.tanh(bound / cap)
        elif term.name == "scale" and isinstance(factor := term.expr(0), Const) and factor.value:
            bound *= abs(factor.value)
        else:
            bound = math.inf
    return bound


def is_static(spec: AttentionSpec, width: int, dtype: str, limits: dict[str, float]) -> bool:
    """Whether every weight of the spec can be exp(score) itself: see the rule above."""
    return score_bound(spec, width, limits) * math.log2(math.e) <= BITS[dtype]
