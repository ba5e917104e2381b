"""Choose a kernel for every site: by measuring each on the site's own data, by the model, or always the first that applies.

Sites with equal specs and shapes are measured once. A kernel that is not clearly better than an attention that was one node
already loses to it; a spelled-out attention is replaced unless the kernel measures slower, because it also saves memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnopt.codegen import LOWERINGS, ON_CPU, ON_GPU
from attnopt.codegen.lowering import GivesWeights, Lowering
from attnopt.codegen.triton.low_precision import refused_by
from attnopt.cost.target import Target, read
from attnopt.ir.graph import Value
from attnopt.ir.site import RECEIVED, Host, NotIsolated, Refusal, Site
from attnopt.patterns import recognise
from attnopt.plan.memory.fitting import left, timed_together
from attnopt.plan.timing.predict import Shapes, best, example_shapes, predicted, shapes_at
from attnopt.plan.timing.timing import Timing, counted, finished, in_turn
from attnopt.report.data import ORIGINAL, Choice

NOISE = 0.03  # a measured difference below this share is a tie
WORTH_MOVING = 0.1  # what an attention that is one node already must gain to be written anew
HOPELESS, LONG = 3.0, 0.2  # a kernel that takes so many times as long as another, and so many seconds, is not timed again


@dataclass(frozen=True)
class Chosen:
    """The kernel of one site (None keeps the original nodes), why, and everything that was considered."""

    site: Site
    lowering: Lowering | None
    why: str
    choices: tuple[Choice, ...] = ()
    seconds_before: float | None = None
    seconds_after: float | None = None


def applicable(
    site: Site, host: Host, runtime: str, opset: int, kind: str = "cpu", arch: str = ""
) -> tuple[list[Lowering], list[Choice]]:
    """The lowerings that can compute the site on a target of this kind, and the others with their reasons.

    arch: of a GPU, which may lack an instruction that the spec asks for.
    """
    fits: list[Lowering] = []
    refused: list[Choice] = []
    for lowering in LOWERINGS:
        elsewhere = ON_CPU if kind == "gpu" else ON_GPU
        if lowering.host != host.kind or lowering in elsewhere:
            continue
        refusal = lowering.supports(site, runtime)
        if refusal is None and lowering in ON_GPU:
            refusal = refused_by(arch, site.spec)
        if refusal is None and lowering.opset > opset > 0:
            refusal = Refusal(f"needs opset {lowering.opset}, the model has {opset}")
        if refusal is None:
            fits.append(lowering)
        else:
            refused.append(Choice(lowering.name, False, refusal.reason))
    return fits, refused


def choose(
    host: Host,
    sites: Sequence[Site],
    inputs: Mapping[str, Tensor] | None,
    *,
    runtime: str,
    opset: int,
    select: str,
    target: Target | None = None,
    loads: Sequence[tuple[float, Mapping[str, int]]] = (),
) -> list[Chosen]:
    """One choice per site. `inputs` are needed for select="measure"; target: default this machine, its kind decides what may run.

    loads: weighted values of symbolic sizes to predict at; default: those of the inputs.
    """
    known: dict[tuple[str, str, bool], Chosen] = {}
    result = []
    for site in sites:
        key = (str(site.spec), str(site.shape), is_fused(site))
        if key not in known:
            known[key] = choose_one(host, site, inputs, runtime, opset, select, target or read("cpu"), loads)
        result.append(replace(known[key], site=site))
    return result


def choose_one(
    host: Host,
    site: Site,
    inputs: Mapping[str, Tensor] | None,
    runtime: str,
    opset: int,
    select: str,
    target: Target,
    loads: Sequence[tuple[float, Mapping[str, int]]] = (),
) -> Chosen:
    fits, refused = applicable(site, host, runtime, opset, target.kind, target.arch)
    if not fits:
        why = refused[0].why if refused else f"no kernel for host {host.kind}"
        return Chosen(site, None, why, tuple(refused))
    if select == "always" or inputs is None:
        return Chosen(site, fits[0], "first kernel that computes it", (Choice(fits[0].name, True, "exact"), *refused))
    if select == "model":
        shapes = shapes_at(site, loads) if loads else example_shapes(host, site, inputs)
        return by_model(host, site, fits, refused, shapes, target)
    return measured(host, site, fits, refused, inputs, target)


def by_model(
    host: Host, site: Site, fits: Sequence[Lowering], refused: Sequence[Choice], shapes: Shapes, target: Target
) -> Chosen:
    """The kernel that is predicted to be fastest at these shapes; nothing runs."""
    if not shapes:
        kept = None if is_fused(site) else fits[0]
        return Chosen(site, kept, "not predicted: a length is only known when the model runs", tuple(refused))
    times = predicted(site, fits, target, shapes, host=host.kind)
    name, why = best(site, times)
    choices = [Choice(n, n == name, f"predicted {e.seconds * 1e3:.3g} ms, {e.why}") for n, e in times.items()]
    return Chosen(site, next((x for x in fits if x.name == name), None), why, (*choices, *refused))


def measured(
    host: Host, site: Site, fits: Sequence[Lowering], refused: Sequence[Choice], inputs: Mapping[str, Tensor], target: Target
) -> Chosen:
    """Time the original nodes and every kernel on what the site's operands hold, in turn; but for what would hold too much memory."""
    whole, some, untimed = timed_together(site, fits, target, example_shapes(host, site, inputs), host.kind, left())
    refused = [*untimed, *refused]
    try:
        calls, failures = site_calls(host, site, some, inputs, whole)
    except NotIsolated as reason:
        kept = Chosen(site, None, f"one kernel already; not measured alone: {reason}", tuple(refused))
        return kept if is_fused(site) else Chosen(site, fits[0], f"predicted, not measured alone: {reason}", tuple(refused))
    if not calls:
        return Chosen(site, None, "no kernel ran", (*failures, *refused))
    times = in_turn(calls, seconds=0.3, clock=counted())
    if not whole:
        return fastest(site, fits, times, (*failures, *refused))
    before = times[ORIGINAL]
    best = min((n for n in times if n != ORIGINAL), key=lambda n: times[n].ratio(before), default=None)
    allowed = 1.0 - WORTH_MOVING if is_fused(site) else 1.0 + NOISE
    ratio = times[best].ratio(before) if best else float("inf")
    taken = best if ratio <= allowed else None
    choices = [
        Choice(
            name,
            name == (taken or ORIGINAL),
            f"{before.median / t.median:.2f}x the original" if name != ORIGINAL else "as it was",
            t.median,
        )
        for name, t in times.items()
    ]
    if taken is None:
        why = f"{best} measured {ratio:.2f} of the time of the original: kept as it was" if best else "no kernel ran"
    else:
        why = f"measured {1 / ratio:.2f}x the original's speed"
    lowering = next((x for x in fits if x.name == taken), None)
    after = times[taken].median if taken else before.median
    return Chosen(site, lowering, why, (*choices, *failures, *refused), before.median, after)


def fastest(site: Site, fits: Sequence[Lowering], times: Mapping[str, Timing], others: Sequence[Choice]) -> Chosen:
    """The kernel that measures fastest where the original was not timed."""
    best = min(times, key=lambda n: times[n].median)
    choices = [Choice(name, name == best, "timed without the original", t.median) for name, t in times.items()]
    lowering = next(x for x in fits if x.name == best)
    return Chosen(site, lowering, "fastest of those timed; the original's scores take too much memory", (*choices, *others), None,
                  times[best].median)  # fmt: skip


def site_calls(
    host: Host, site: Site, fits: Sequence[Lowering], inputs: Mapping[str, Tensor], whole: bool = True
) -> tuple[dict[str, Callable[[], object]], list[Choice]]:
    """The original nodes and each kernel as callables on captured data; kernels that fail to run are reported, not hidden."""
    read = boundary(site)
    data = host.tap(read, inputs)
    calls: dict[str, Callable[[], object]] = {ORIGINAL: bind(host.isolate(read, [site.output.value]), data)} if whole else {}
    failures = []
    seconds: dict[str, float] = {}
    for lowering in fits:
        trial = host.copy()
        twin = like(site, next(s for s in recognise(trial.graph).sites if s.name == site.name))
        try:
            result = emit(trial, twin, lowering)
            call = bind(trial.isolate(boundary(twin), [result]), data)
            call()
            finished()
            started = time.perf_counter()
            call()
            finished()
            seconds[lowering.name] = time.perf_counter() - started
        except Exception as failure:
            failures.append(Choice(lowering.name, False, f"failed to run: {str(failure).splitlines()[0][:120]}"))
            continue
        calls[lowering.name] = call
        for name in hopeless(seconds):  # now, because each holds the memory of its whole score matrix
            why = f"{seconds[name] / min(seconds.values()):.1f} times as long as {min(seconds, key=seconds.__getitem__)}"
            failures.append(Choice(name, False, why, seconds.pop(name)))
            del calls[name]
    return calls, failures


def like(site: Site, twin: Site) -> Site:
    """The site of a copy of the host, computing what the site is to compute: a layer's spec may stand for what the host's nodes say."""
    operands = {name: twin.operands[name] for name in site.operands}
    form = None if site.tensor_form is None else twin.tensor_form
    return replace(twin, spec=site.spec, operands=operands, tensor_form=form, steps=site.steps)


def hopeless(seconds: Mapping[str, float]) -> list[str]:
    """The kernels that one run each shows to be far behind the best: noise does not explain it."""
    best = min(seconds.values(), default=0.0)
    return [name for name, spent in seconds.items() if spent > max(LONG, HOPELESS * best)]


def boundary(site: Site) -> list[Value]:
    """The values of the host that a site reads, each once; for a value that the host does not hold, what it is made of."""
    return list(dict.fromkeys(v for o in site.reads for v in held(o.value)))


def held(value: Value) -> list[Value]:
    if value.is_constant:
        return []
    if value.handle is not None or value.producer is None:
        return [value]
    return [v for i in value.producer.inputs if i is not None for v in held(i)]


def bind(call: Callable[[Sequence[Any]], list[Any]], data: Sequence[Any]) -> Callable[[], object]:
    return lambda: call(data)


def emit(host: Host, site: Site, lowering: Lowering) -> Value:
    """Write one kernel before the site's output, or before what it computes beside it, and let everything read it."""
    received = site.codes.get(RECEIVED)
    node = (site.output.value if received is None else received).producer
    assert node is not None
    if received is None:
        result = lowering.emit(site, host.builder(node))
    else:
        assert isinstance(lowering, GivesWeights)
        result, given = lowering.emit_both(site, host.builder(node))
        host.replace(received, given)
    host.replace(site.output.value, result)
    return result


def apply_choices(host: Host, chosen: Sequence[Chosen]) -> Host:
    """A copy of the host with every chosen kernel in place."""
    wanted = {c.site.name: c.lowering for c in chosen if c.lowering is not None}
    if not wanted:
        return host
    result = host.copy()
    replaced: dict[Value, Value] = {}
    for site in recognise(result.graph).sites:
        if site.name in wanted:
            current = site.reading(replaced)
            replaced[site.output.value] = emit(result, current, wanted[site.name])
    result.finish()
    return result


def is_fused(site: Site) -> bool:
    """Whether the site was one attention node already."""
    return any(node.op == "attention" for node in site.nodes)
