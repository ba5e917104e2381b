"""Inputs of the shapes that a plan is for, so that these are timed where the host can take them: the example's, repeated or cut.

    input_ids [2, 16], a symbol for each size      prefill:512x4   ->   [4, 512]: the same tokens again and again

Only times are measured on them: what values mean (positions, a padding mask) does not matter there, and each is one that the example
has, so that an index stays inside its table. The original runs on them once before they are used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.cost.memory import peak_memory
from attnopt.cost.nodes import estimate_nodes
from attnopt.cost.target import Target
from attnopt.cost.workload import Bound, Workload
from attnopt.ir.dims import evaluate
from attnopt.ir.site import Host, Refusal, Site
from attnopt.plan.search.effort import Effort

PART = 0.05  # of the effort's seconds: a call that takes longer is not timed, since dozens of models are timed many times
ROOM = 0.5  # of the free memory that one call may take
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shaped:
    """What models are timed on: (weight, inputs), the one that takes most of the time first; none where that cannot be, and why."""

    loads: tuple[tuple[float, Inputs], ...]
    why: str = ""


def shaped(
    host: Host, sites: Sequence[Site], inputs: Inputs, workload: Workload, target: Target, runtime: str, effort: Effort
) -> Shaped:
    """Inputs for each load of a workload. Raises WorkloadError for a load that the model cannot do."""
    run, made = host.runner(), list[tuple[float, float, Inputs]]()
    for bound in workload.bind(sites):
        sizes = {**host.graph.sizes(inputs), **bound.sizes}
        if (refusal := too_large(host, bound, sizes, inputs, target, runtime, effort)) is not None:
            return Shaped((), refusal.reason)
        given = resized(host, inputs, sizes)
        started = time.perf_counter()
        try:
            run(given)
        except Exception as failure:  # of any runtime, for shapes that it was not exported for
            return Shaped((), f"the model does not run on inputs made for '{bound.load}': {str(failure).splitlines()[0][:120]}")
        made.append((bound.weight * (time.perf_counter() - started), bound.weight, given))
    made.sort(key=lambda load: -load[0])
    return Shaped(tuple((weight, given) for _, weight, given in made))


def resized(host: Host, inputs: Inputs, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The example with these sizes; a dimension that none of them decides keeps its own."""
    made = dict(inputs)
    for value in host.graph.inputs:
        if value.name not in inputs or value.shape is None:
            continue
        tensor = inputs[value.name]
        for axis, dim in enumerate(value.shape):
            try:
                size = evaluate(dim, sizes)
            except KeyError:
                continue
            if size != tensor.shape[axis] > 0:
                tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
        made[value.name] = tensor
    return made


def too_large(
    host: Host, bound: Bound, sizes: Mapping[str, int], inputs: Inputs, target: Target, runtime: str, effort: Effort
) -> Refusal | None:
    """Why a call at this load would take too long to be timed, or more memory than there is; by prediction, before it runs."""
    needed, free = peak_memory(host.graph, sizes), free_memory(inputs)
    if free is not None and needed > ROOM * free:
        return Refusal(f"'{bound.load}' takes about {needed / 2**30:.2g} GiB, and {free / 2**30:.2g} GiB are free here")
    seconds = estimate_nodes(host.graph.nodes, sizes, target, runtime=runtime).seconds
    if seconds > PART * effort.seconds:
        return Refusal(f"a call at '{bound.load}' takes about {seconds:.2g} s, too long to time at effort {effort.name}")
    return None


def free_memory(inputs: Inputs) -> float | None:
    """Bytes, on the device that holds the inputs; None where the system does not tell."""
    device = next((x.device for x in inputs.values() if x.device.type == "cuda"), None)
    if device is not None:
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None
