"""What fits into memory while an optimisation measures: inputs that the original can be run on, and kernels that are timed together.

    [1, 8192] with 8 heads spelled out: scores of 2.1 GB, several at a time   ->   [1, 4096], and a line in the report
    original, ort-mha, ort-gqa at 8,192   ->   ort-gqa; the others hold the scores, and are predicted to be slower

A session of onnxruntime keeps what it once held, so that callables which are timed in turn add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attnopt.codegen.lowering import Lowering
from attnopt.cost.memory import peak_memory, scratch
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.ir.site import Host, Site
from attnopt.plan.memory import resident
from attnopt.plan.timing.predict import Shapes, predicted
from attnopt.plan.timing.shaped import resized
from attnopt.report.data import ORIGINAL, Choice

SHARE = 0.5  # of the machine's memory that the process may hold
TOGETHER = 0.25  # of what is left of it, for the scores of all kernels of one site that are timed in turn
MATRICES = 3.0  # score matrices that nodes of their own hold at a time: scores, scores with a mask, weights
SHORTEST = 128  # a size is not cut below that


def left() -> float | None:
    """Bytes that the process may still take; None where the machine does not tell what it has."""
    return max(0.0, SHARE * resident.machine() - resident.held()) if resident.machine() else None


def within_memory(host: Host, inputs: Mapping[str, Tensor], room: float | None) -> tuple[Mapping[str, Tensor], str]:
    """The inputs, their longest open size halved until the original fits; and a line that says so, "" where they are as they were.

    So are those of a model that does not fit however short they are.
    """
    sizes = dict(host.graph.sizes(inputs))
    try:
        needed = first = peak_memory(host.graph, sizes, weights=0.0)  # weights are held already
        whole = dict(sizes)
        while room is not None and needed > room:
            name = max(sizes, key=lambda n: sizes[n], default="")
            if not name or sizes[name] < 2 * SHORTEST:
                break
            sizes[name] //= 2
            needed = peak_memory(host.graph, sizes, weights=0.0)
    except KeyError:  # a size that is only known when the model runs
        return inputs, ""
    if sizes == whole or room is None or needed > room:
        return inputs, ""
    cut = resized(host, inputs, sizes)
    try:
        host.runner()(cut)
    except Exception:  # of any runtime: the model takes no other sizes
        return inputs, ""
    changed = ", ".join(f"{name} {whole[name]} -> {size}" for name, size in sizes.items() if size != whole[name])
    return cut, (
        f"compared and timed on shorter inputs ({changed}): the original would hold about {first / 2**30:.2g} GiB, "
        f"and {room / 2**30:.2g} GiB are for it"
    )


def timed_together(
    site: Site, fits: Sequence[Lowering], target: Target, shapes: Shapes, host: str, room: float | None
) -> tuple[bool, list[Lowering], list[Choice]]:
    """(whether the original is timed, the kernels that are, why others are not): what holds most goes, unless it is predicted fastest."""
    if room is None or not shapes:
        return True, list(fits), []
    problem = Problem(site.spec, dict(shapes[0][1]), site.q.value.dtype or "float32")
    times = {name: made.seconds for name, made in predicted(site, fits, target, shapes, host=host).items()}
    fused = any(node.op == "attention" for node in site.nodes)
    held = {x.name: scratch(x.name, problem) for x in fits}
    held[ORIGINAL] = scratch("sdpa" if fused and host == "torch" else ORIGINAL, problem) * (1.0 if fused else MATRICES)
    total, kept = 0.0, list[str]()
    for name in sorted(held, key=lambda n: (held[n], times[n])):
        if kept and total + held[name] > TOGETHER * room and times[name] > min(times[n] for n in kept):
            continue
        kept.append(name)
        total += held[name]
    best = min(kept, key=lambda n: times[n])
    told = [
        Choice(
            name,
            False,
            f"not timed: it holds {held[name] / 2**30:.2g} GiB, and {best} is predicted to be {times[name] / times[best]:.1f}x as fast",
        )
        for name in held
        if name not in kept
    ]
    return ORIGINAL in kept, [x for x in fits if x.name in kept], told
