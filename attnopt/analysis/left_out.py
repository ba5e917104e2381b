"""What sparser forms of one attention would leave out, from its q and k on calibration data.

    weights [H, Q, K] of the attention as it is, pairs that a form shows   ->   dropped [H], worst, kept

Leaving out keys of weight m changes a row of the output by at most 2 m max|v|; a correction may add what another row lost.
Selections look at whole samples, so one sample's scores are in memory at a time (those of a batch where the spec reads operands). A
query counts where it is no padding and sees a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.analysis.calibration import Batch
from attnopt.analysis.operands import held, tapped
from attnopt.analysis.padding import Padding
from attnopt.ir.graph import Graph, Value
from attnopt.ir.reference import rows_of, weights_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Of one form: dropped [H], the mean over queries of the weight on keys that it hides; worst: the largest of any query.

    kept: share of the visible pairs that it shows. largest: magnitude in v.
    """

    dropped: Tensor
    worst: float
    kept: float
    largest: float

    @property
    def mean(self) -> float:
        return float(self.dropped.mean())

    @property
    def bound(self) -> float:
        """2 m max|v|: what an output changes by at most, on average over the queries of the worst head."""
        return 2.0 * float(self.dropped.max()) * self.largest

    @property
    def corrected_bound(self) -> float:
        """The same where rows are shifted by what another row lost, which may be the row that loses most: 2 (m + worst) max|v|."""
        return self.bound + 2.0 * self.worst * self.largest


@dataclass
class LeftOutMeasure:
    """The running sums of one site over all of its forms, in their order."""

    key: str
    site: Site
    graph: Graph
    padding: Padding
    forms: Sequence[AttentionSpec]
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Value, ...]:
        return tapped(self.site)

    @property
    def size(self) -> int:
        return 2**16

    def begin(self, heads: int) -> None:
        if not self.sums:
            dropped = torch.zeros(len(self.forms), heads, dtype=torch.float64)
            each = torch.zeros(len(self.forms), dtype=torch.float64)
            self.sums = {"dropped": dropped, "worst": each.clone(), "kept": each.clone(),
                         **{n: torch.zeros((), dtype=torch.float64) for n in ("rows", "pairs", "largest")}}  # fmt: skip

    def add(self, data: Mapping[Value, Tensor], inputs: Batch) -> None:
        on = held(self.site, data, self.graph.sizes(inputs))
        real = self.padding.rows(self.site.size("q"), len(on.q), on.q.shape[2], inputs)
        self.begin(on.q.shape[1])
        step = len(on.q) if on.operands else 1  # an operand may differ from sample to sample
        for at in range(0, len(on.q), step):
            q, k, v = (x[at : at + step].float() for x in (on.q, on.k, on.v))
            rows = rows_of(self.site.spec, q, k, v, on.operands)
            weights = weights_of(rows).abs().transpose(0, 1)  # [H, B, Q, K]
            counts = rows.visible.any(-1).all(1)  # [B, Q]
            counts = counts if real is None else counts & real[at : at + step]
            shown = rows.visible.transpose(0, 1)[:, counts]
            self.sums["rows"] += int(counts.sum())
            self.sums["pairs"] += int(shown.sum())
            self.sums["largest"] = torch.maximum(self.sums["largest"], v.abs().max().double())
            for i, form in enumerate(self.forms):
                seen = rows_of(form.with_(correction=None), q, k, v, on.operands).visible.transpose(0, 1)[:, counts]
                gone = (weights[:, counts] * ~seen).double().sum(-1)  # [H, rows]
                self.sums["dropped"][i] += gone.sum(-1)
                self.sums["worst"][i] = torch.maximum(self.sums["worst"][i], gone.max() if gone.numel() else gone.new_zeros(()))
                self.sums["kept"][i] += int((seen & shown).sum())

    def state(self) -> dict[str, Tensor]:
        return self.sums

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sums = dict(state)

    def result(self) -> dict[str, Tensor]:
        self.begin(1)
        rows, pairs = (self.sums[name].clamp(min=1) for name in ("rows", "pairs"))
        return {**self.sums, "dropped": self.sums["dropped"] / rows, "kept": self.sums["kept"] / pairs}


def forms_of(result: Mapping[str, Tensor]) -> list[LeftOut]:
    return [
        LeftOut(dropped, float(worst), float(kept), float(result["largest"]))
        for dropped, worst, kept in zip(result["dropped"], result["worst"], result["kept"], strict=True)
    ]
