"""What a rewrite loses where it is made: the relative error of one site's output on real activations, before any other layer reads it.

    site_loss(evidence, site, spec)                  another spec on the same q, k, v: ||o - o'|| / ||o||
    part_loss(evidence, trial, reads, made, instead)     other nodes in a copy of the host, on the same inputs

Per-site losses are cheap and tell which candidates are worth a run of the whole model; only that run (`judge`) decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.analysis.attention_mass import SCORES
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.ir.graph import Value
from attnopt.ir.row_blocks import attended
from attnopt.ir.site import Host, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.plan.judge.quality import Loss

NAME = "relative error of the site"


def site_loss(evidence: Evidence, site: Site, spec: AttentionSpec, operands: Mapping[str, Tensor] | None = None) -> Loss:
    """The relative error of the output [B, H, Q, E] of a site of the host if it computed `spec` instead, sample by sample.

    operands: tensors that the new spec loads besides those of the site, or instead of them. Padding and queries that see no key do
    not count. Raises NotIsolated for a site whose operands cannot be tapped, InputMismatch where the spec does not fit them.
    """
    padding, graph = Padding.of(evidence.host.graph), evidence.host.graph
    values: list[float] = []
    reads = tapped(site)
    for inputs, data in evidence.hold(reads):
        on = held(site, dict(zip(reads, data, strict=True)), graph.sizes(inputs))
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (on.q, on.k, on.v))
        real = padding.rows(site.size("q"), len(q), q.shape[2], inputs)
        wanted, sees = outputs(site.spec, q, k, v, on.operands, on.sizes)
        got, _ = outputs(spec, q, k, v, {**on.operands, **(operands or {})}, on.sizes)
        counts = sees if real is None else sees & real
        squares, total = (x.double().square().sum((1, 3)).masked_fill(~counts, 0.0).sum(-1) for x in (wanted - got, wanted))
        values += relative_errors(squares, total, evidence.calibration.size(inputs))
    return Loss.of(NAME, values)


def outputs(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """What the reference computes [B, H, Q, E], a block of rows at a time, and whether a query sees a key [B, Q]."""
    made = [(b.output, b.visible.any(-1).any(1)) for b in attended(spec, q, k, v, operands, sizes=sizes, elements=SCORES)]
    return torch.cat([o for o, _ in made], 2), torch.cat([s for _, s in made], 1)


def part_loss(evidence: Evidence, trial: Host, reads: Sequence[Value], made: Value, instead: Value) -> Loss:
    """The relative error of a value of the host, sample by sample, if a rewritten copy computed it.

    reads: values of the host that the part reads; they are fed to the copy as the host computes them. made: the value of the host;
    instead: the value of the copy that stands for it. Rows of padding do not count. Raises NotIsolated where the part reads more.
    """
    twins = {v.name: v for v in (*trial.graph.inputs, *(o for n in trial.graph.nodes for o in n.outputs))}
    call = trial.isolate([twins[v.name] for v in reads], [instead])
    padding = Padding.of(evidence.host.graph)
    values: list[float] = []
    for inputs, (*data, wanted) in evidence.hold([*reads, made]):
        (got,) = call(data)
        real = padding.leading(made.shape, wanted, inputs)
        size = evidence.calibration.size(inputs)
        sums = [per_sample(x.double().square(), real, size) for x in (wanted - got, wanted)]
        values += relative_errors(sums[0], sums[1], size)
    return Loss.of(NAME, values)


def per_sample(squares: Tensor, real: Tensor | None, samples: int) -> Tensor:
    """Sums over the real rows of each sample [samples]; over all rows [1] where the samples do not come first."""
    by_row = squares.sum(-1)
    if real is not None:
        by_row = by_row.masked_fill(~real.reshape(*real.shape, *[1] * (by_row.ndim - real.ndim)), 0.0)
    first = by_row.ndim and (by_row.shape[0] == samples or (by_row.ndim == 1 and by_row.shape[0] % samples == 0))
    return by_row.reshape(samples if first else 1, -1).sum(-1)


def relative_errors(squares: Tensor, total: Tensor, samples: int) -> list[float]:
    """sqrt(squares / total) of each sample that has rows; of all together where these are not the samples."""
    if len(squares) != samples:
        squares, total = squares.sum(0, keepdim=True), total.sum(0, keepdim=True)
    return [float((s / t).sqrt()) for s, t in zip(squares, total, strict=True) if float(t) > 0]
