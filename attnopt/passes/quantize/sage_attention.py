"""Multiply rounded queries and keys, and rounded weights and values, in the attention of long prompts.

    softmax scale(s) causal   ->   softmax scale(s) causal precision(q=int8, k=int8, p=fp8, v=fp8, …, k_smooth=0, block=64)

    s = scale_q scale_k (code of q) (code of k - k̄)'        k̄ the mean of all keys: it moves every score of a row alike
    o = scale_v (fp8(448 p) code of v) / (448 sum p)        p = exp(s - largest so far), scale_v of each channel

Rows share scales as the fragments of a tensor core do: within 32 queries those of equal row % 8, within 64 keys those of equal
(k % 8) // 2. int4 takes the mean of every 128 queries out too, and returns it in full. Where calibration shows channels of v
whose mean is larger than their spread, v less its mean is one more variant; not where the mask reads data, for then padding counts
in the mean, and real rows stand far from it.

Which layers get 8 bits, 4 bits or none is not decided here: the entry sorts layers by the cosine similarity of their outputs until a
budget is met; the planner measures what each variant of each layer loses, and solves for the fastest plan.

Source: "SageAttention2: Efficient Attention with Thorough Outlier Smoothing and Per-thread INT4 Quantization".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, Index, apply, operands
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per

SOURCE = "SageAttention2"
FEW = 16  # queries that are no product for tensor cores: such a call reads keys, and a cache says how they are stored
WARP, TILE, SMOOTHED, BLOCK = 32, 64, 128, 64  # rows of a warp, keys of a tile, queries of one mean, keys between two sums
VALUES: dict[str, dict[str, str | int]] = {
    "fp32": {},
    "fp16": {"block": BLOCK},
    "fp8": {"v_axis": "channel", "block": BLOCK, "sum": "fp22"},
}
VARIANTS = (("int8", "fp32"), ("int8", "fp16"), ("int8", "fp8"), ("int4", "fp8"))


@dataclass(frozen=True)
class SageAttention:
    """Multiply rounded queries and keys, and rounded weights and values, in the attention of long prompts.

    variants: types of (q and k, p and v). offset: how much larger than its spread the mean of a channel of v must be somewhere for v
    to be smoothed.
    """

    variants: tuple[tuple[str, str], ...] = VARIANTS
    offset: float = 1.0
    name: str = "sage-attention"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        (site,) = group.sites
        refusal = refuse(site, group.host.kind)
        if refusal is not None:
            return refusal
        seen = None if evidence is None else evidence.attention(site)
        whole = site.spec.mask is None or not operands(site.spec.mask)
        smooth = whole and seen is not None and leans(seen.v.mean, seen.v.variance, self.offset)
        tried = [(scores, values, False) for scores, values in self.variants]
        tried += [(scores, values, True) for scores, values in self.variants if smooth and values == "fp8"]
        return [self.candidate(*variant) for variant in tried]

    def candidate(self, scores: str, values: str, smooth_values: bool) -> Candidate:
        kind = f"{scores} scores, {values} values" + (" smoothed" if smooth_values else "")
        return Candidate(
            self.name,
            False,
            f"queries and keys in {scores}, weights and values {'as they are' if values == 'fp32' else f'in {values}'}"
            + (", values less their mean" if smooth_values else ""),
            SOURCE,
            options={"scores": scores, "values": values, "smooth_values": smooth_values},
            kind=kind,
            changes=("precision",),
            needs="calibration" if smooth_values else "nothing",
        )

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with rounded products in the spec of its site."""
        (site,) = group.sites
        o = candidate.options
        spec = site.spec.with_(precision=precision(o["scores"], o["values"], smooth_values=o["smooth_values"]))
        return replace(group, sites=(site.with_step(self.name, spec),))


def precision(scores: str, values: str, *, smooth_values: bool = False) -> Clause:
    """The clause of one variant: per-thread groups, smoothed keys, and with int4 smoothed queries."""
    row, k = Index("row"), Index("k")
    options: dict[str, str | int | Expr] = {
        "q": scores,
        "k": scores,
        "p": values,
        "v": values,
        "q_group": apply("add", apply("mul", apply("floordiv", row, WARP), 8), apply("mod", row, 8)),
        "k_group": apply("add", apply("mul", apply("floordiv", k, TILE), 4), apply("floordiv", apply("mod", k, 8), 2)),
        "k_smooth": 0,
        **VALUES[values],
    }
    if scores == "int4":
        options["q_smooth"] = apply("floordiv", row, SMOOTHED)
    if smooth_values:
        options["v_smooth"] = 0
    return Clause("precision", (), tuple(options.items()))


def leans(mean: Tensor, variance: Tensor, offset: float) -> bool:
    """Whether the mean of some channel is so many times as large as its spread."""
    return bool((mean.square() > offset**2 * variance).any())


def refuse(site: Site, host: str) -> Refusal | None:
    """None where rounding the products can save time here, and the reference knows what it means."""
    if host != "torch":
        return Refusal("no operator of ONNX multiplies rounded queries and keys inside of an attention", site.name)
    if site.spec.precision is not None or site.spec.cache is not None:
        return Refusal(f"it is rounded already: {site.spec.precision or site.spec.cache}", site.name)
    if site.spec.normalizer.name != "softmax":
        return Refusal(
            f"the normaliser is {site.spec.normalizer}: smoothing needs rows that a constant does not change", site.name
        )
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    queries = site.size("q")
    if isinstance(queries, int) and queries < FEW:
        return Refusal(f"{queries} queries: the products take no time", site.name)
    return None
