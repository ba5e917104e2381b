"""The attention of each layer of a live model: its spec in both phases, and the kernel that computes it there.

    layer 3 calls (scaling 0.125, window 64), its site says "causal & window(64) & padding"
        ->   prefill "softmax scale(0.125) causal & window(64)" by tvm-prefill, decode "softmax scale(0.125)" by tvm-decode

Without a mask from transformers there is no padding and no packing: of the site's mask what depends on positions alone is left. Factors
are those of the call itself, because a trace may have folded others into them. Kernels are chosen as `optimize` chooses them, each in a
model that is this attention alone; layers that are alike share one.

A plan that changes what the layer asks gives it another spec. Its mask holds in both phases, at decoding with
`offset(size(k) - size(q))`; selections, corrections and rounded products are of prompts, and one query computes without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.codegen import LOWERINGS
from attnopt.codegen.lowering import Lowering
from attnopt.cost.target import Target
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.narrowing import reach_of, without_terms
from attnopt.ir.at_end import AT_END
from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr, conjuncts, operands
from attnopt.ir.expr import apply as applied
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.plan.choose import Chosen, applicable, by_model, measured
from attnopt.plan.live.phases import DECODE, PREFILL, Shape, example, kernel, opened, site_of
from attnopt.plan.timing.predict import example_shapes
from attnopt.report.data import ORIGINAL

LENGTH = 1024  # tokens at which kernels are timed
COMPILED_FOR_LENGTHS = ("flex",)  # anew for every length that comes, which takes longer than reading the prompt
FASTER = 0.9  # of the time of the model's own kernel: one that gains less is not worth another way of computing


@dataclass
class Chooser:
    """select: as in `optimize`. own_sdpa: the model computes attention by torch's kernel already. chosen: by phase, shape and spec."""

    select: str
    target: Target
    length: int = LENGTH
    device: str = "cpu"
    own_sdpa: bool = False
    chosen: dict[tuple[str, Shape, str], Chosen] = field(default_factory=dict)

    def best(self, phase: str, shape: Shape, spec: AttentionSpec) -> Chosen:
        key = (phase, shape, str(spec))
        if key not in self.chosen:
            self.chosen[key] = self.worth_it(self.found(phase, shape, spec))
        return self.chosen[key]

    def found(self, phase: str, shape: Shape, spec: AttentionSpec) -> Chosen:
        host, inputs = opened(phase, shape), example(phase, shape, batch=1, length=self.length)
        site = site_of(host, spec)
        fits, refused = applicable(site, host, "torch", 0, self.target.kind, self.target.arch)
        fits = [x for x in fits if x.name not in COMPILED_FOR_LENGTHS]
        if not fits:
            return Chosen(site, None, refused[0].why if refused else "no kernel for torch", tuple(refused))
        if self.select == "always":
            return Chosen(site, fits[0], "first kernel that computes it")
        if self.select == "model":
            return by_model(host, site, fits, refused, example_shapes(host, site, inputs), self.target)
        return measured(host, site, fits, refused, inputs, self.target)

    def needed(self, phase: str, shape: Shape, spec: AttentionSpec) -> Lowering | None:
        """The best kernel of a spec that nothing but a kernel computes; None where there is none."""
        if (chosen := self.best(phase, shape, spec)).lowering is not None:
            return chosen.lowering
        timed = {c.kernel: c.seconds for c in chosen.choices if c.seconds and c.kernel != ORIGINAL}
        fits, _ = applicable(
            site_of(opened(phase, shape), spec), opened(phase, shape), "torch", 0, self.target.kind, self.target.arch
        )
        fits = [x for x in fits if x.name not in COMPILED_FOR_LENGTHS]
        return min(fits, key=lambda x: timed.get(x.name, float("inf")), default=None)

    def worth_it(self, found: Chosen) -> Chosen:
        """The choice, or none where the model's own kernel, sdpa, is as fast."""
        times = {c.kernel: c.seconds for c in found.choices if c.seconds}
        if not self.own_sdpa or found.lowering is None or "sdpa" not in times:
            return found
        ratio = times.get(found.lowering.name, times["sdpa"]) / times["sdpa"]
        return (
            found
            if ratio <= FASTER
            else replace(found, lowering=None, why=f"the model's own sdpa takes {1 / ratio:.2f} of its time")
        )


def specs(site: Site, call: AttentionCall, planned: AttentionSpec | None = None) -> tuple[AttentionSpec, AttentionSpec] | Refusal:
    """(of a prompt, of one query on a cache) where transformers made no mask. planned: the site's spec after a plan, if it has one."""
    if call.others:
        return Refusal(f"the layer hands over {call.others[0]}, which its spec does not say", site.name)
    known = site.spec.with_(heads=None, width=None, score=(), mask=None, empty_row="mean")
    if known != AttentionSpec():
        return Refusal(f"'{known}' is left to the model's own attention", site.name)
    if any(clause.name not in ("scale", "softcap") for clause in site.spec.score):
        return Refusal("the layer adds a bias to its scores", site.name)
    score = [Clause("scale", (call.scaling,))]
    if call.softcap is not None:
        score.append(Clause("softcap", (float(call.softcap),)))
    seen = by_position(site.spec.mask)
    if call.causal != ("causal" in str(seen)):
        return Refusal("the trace and the layer do not agree on whether a token sees those after it", site.name)
    plain = AttentionSpec(score=tuple(score))
    prompt = plain.with_(mask=seen, empty_row="zero" if seen is not None else "mean")
    if planned is None:
        return prompt, plain
    own = operands(site.spec.mask)
    if read := [name for name in operands(planned.mask) if name not in own]:
        return Refusal(f"the new mask reads the tensor '{read[0]}', which no call of the layer hands over", site.name)
    parts = {name: getattr(planned, name) for name in ("selection", "correction", "precision")}
    if planned.correction is not None and (dense := planned.correction.expr_or_none("dense")) is not None:
        options = {**dict(planned.correction.options), "dense": by_position(dense)}
        parts["correction"] = replace(planned.correction, options=tuple((n, x) for n, x in options.items() if x is not None))
    prompt = prompt.with_(mask=by_position(planned.mask), **parts)
    return prompt, one_query(prompt, narrows(site, planned))


def narrows(site: Site, planned: AttentionSpec | None) -> bool:
    """Whether a plan hides other keys by their positions than the layer itself, and of every call: a correction is of prompts alone."""
    if planned is None or planned.correction is not None:
        return False
    return by_position(planned.mask) != by_position(site.spec.mask)


def one_query(prompt: AttentionSpec, narrowed: bool) -> AttentionSpec:
    """The spec of one query on a cache, from that of a prompt: its own mask is what the cache holds, that of a plan is applied."""
    plain = AttentionSpec(score=prompt.score)
    return plain.with_(mask=prompt.mask, empty_row="zero", offset=AT_END) if narrowed else plain


def by_position(mask: Expr | None) -> Expr | None:
    """The conjuncts of a mask that read no tensor."""
    parts = [part for part in conjuncts(mask) if not operands(part)]
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = applied("and", whole, part)
    return whole


def layer_attention(
    site: Site, call: AttentionCall, chooser: Chooser, planned: AttentionSpec | None = None
) -> LayerAttention | Refusal:
    """The site's layer with the kernels that are chosen for it; without any where its own attention is as fast."""
    both = specs(site, call, planned)
    if isinstance(both, Refusal):
        return both
    shape = Shape.of(call, chooser.device)
    narrowed = narrows(site, planned)
    names: list[str | None] = []
    for phase, spec in zip((PREFILL, DECODE), both, strict=True):
        if narrowed and phase == DECODE and reach_of(spec.mask) is not None:  # type: ignore[arg-type]
            names.append(None)  # few keys are cut out, and the model's own attention reads no others
            continue
        needed = bool(spec.selection or spec.correction or spec.precision)
        lowering = chooser.needed(phase, shape, spec) if needed else chooser.best(phase, shape, spec).lowering
        if needed and lowering is None:
            return Refusal(f"no kernel here computes '{spec}'", site.name)
        names.append(None if lowering is None else lowering.name)
    return with_kernels(str(both[0]), call, names, chooser.device, narrowed)


def without_kernels(site: Site, call: AttentionCall, device: str) -> LayerAttention | Refusal:
    """What the site's layer computes in its own way."""
    both = specs(site, call)
    return both if isinstance(both, Refusal) else with_kernels(str(both[0]), call, (None, None), device)


def with_kernels(
    spec: str, call: AttentionCall, names: Sequence[str | None], device: str = "cpu", narrowed: bool = False, least: int = 0
) -> LayerAttention:
    """A layer with the kernels of these names, as when it was saved."""
    known: Mapping[str, Lowering] = {x.name: x for x in LOWERINGS if x.host == "torch"}
    shape, whole = Shape.of(call, device), parse(spec)
    lines = {PREFILL: whole, DECODE: one_query(whole, narrowed)}
    made = [
        None if not n else kernel(phase, shape, lines[phase], known[n]) for phase, n in zip((PREFILL, DECODE), names, strict=True)
    ]
    mask = whole.mask if narrowed else None
    spelled, reach = (None, None) if mask is None else (without_terms(mask), reach_of(mask))
    return LayerAttention(spec, call, made[0], made[1], (names[0] or "", names[1] or ""), device, spelled, reach, least=least)
