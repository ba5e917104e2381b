"""The judge: runs a rewritten model beside the original on real inputs and says what it loses, sample by sample.

    judge = Judge(host, calibration, Budget.of(0.01))          judge.loss(trial) -> Loss          judge.accepts(loss) -> bool

The data are cut into samples; rows that an attention_mask calls padding do not count (see `analysis.padding`), nor do rows in which
the original itself holds NaN. Outputs of the original are kept up to a bound, and computed again beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.calibration import Batch, Calibration
from attnopt.analysis.padding import Padding
from attnopt.analysis.progress import progress
from attnopt.errors import BudgetError
from attnopt.ir.site import Host, Runner
from attnopt.plan.judge.budget import NATURAL, QUALITY, Budget
from attnopt.plan.judge.quality import METRICS, Loss, Metric, Score, natural_metric

MEMORY = 256 * 2**20  # bytes of outputs of the original that are kept


def always(loss: Loss) -> bool:
    return True


class Judge:
    """Losses against one original on one half of the calibration data, in the budget's metric on the first real output.

    quality: for metric="quality", a function of the named inputs and the named outputs of one batch that returns a score for each of
    its samples, or one score for the batch (which is then one sample); higher is better.
    names: of the outputs. Raises BudgetError where the metric does not fit the outputs or the quality function.
    """

    def __init__(
        self,
        host: Host,
        calibration: Calibration,
        budget: Budget,
        *,
        names: Sequence[str] = (),
        quality: Score | None = None,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        if not calibration.batches:
            raise BudgetError("there is no data to measure a loss on", next_move="Give calibration=[…].")
        if (budget.metric == QUALITY) != (quality is not None):
            said = (
                "a budget in quality needs a score"
                if quality is None
                else f"a score is given, but the budget is in {budget.metric}"
            )
            raise BudgetError(said, next_move='Give quality=my_score and budget=Budget(metric="quality", drop=0.005).')
        self.calibration, self.budget, self.quality, self.seed = calibration, budget, quality, seed
        self.names = tuple(names)
        self._graph, self._padding = host.graph, Padding.of(host.graph)
        self._run = host.runner()
        self._left = memory
        self._kept: dict[int, list[Tensor]] = {}
        self._scores: dict[int, list[float]] = {}
        first = self.original(0)
        self.output = next((i for i, t in enumerate(first) if t.is_floating_point()), None)
        self.metric = Metric("drop of quality", lambda a, b: 0.0) if quality else self.metric_of(first)

    def metric_of(self, outputs: Sequence[Tensor]) -> Metric:
        if self.output is None:
            raise BudgetError(
                "the model returns no real numbers, on which a loss is measured",
                next_move="Give a budget in quality and a score.",
            )
        name = self.names[self.output] if self.output < len(self.names) else ""
        output = outputs[self.output]
        if self.budget.metric == NATURAL:
            return natural_metric(name, output)
        if output.ndim < 2 and self.budget.metric != "relative":
            raise BudgetError(
                f"output '{name}' of shape {list(output.shape)} has no last dimension for {self.budget.metric}",
                next_move='Give Budget(metric="relative", limit=…).',
            )
        return METRICS[self.budget.metric]

    def loss(self, host: Host, title: str = "loss", most: int | None = None, ends: Callable[[Loss], bool] = always) -> Loss:
        """What this host loses against the original. most: on the first batches that hold so many samples, where `ends` says of these
        that they are enough; else on all.
        """
        run, few = host.runner(), self.enough(most)
        values: list[float] = []
        for i in progress(range(len(self.calibration.batches)), title):
            values += self.batch_losses(i, run)
            if i + 1 == few < len(self.calibration.batches) and ends(first := Loss.of(self.metric.name, values, self.seed)):
                return first
        return Loss.of(self.metric.name, values, self.seed)

    def enough(self, most: int | None) -> int:
        """How many batches, from the first on, hold this many samples; all of them where none are said or there are no more."""
        held = 0
        for i, batch in enumerate(self.calibration.batches):
            if most is not None and held >= most:
                return i
            held += self.calibration.size(batch)
        return len(self.calibration.batches)

    def accepts(self, loss: Loss) -> bool:
        """Whether the loss is within the budget, with 95 % confidence."""
        return loss.upper <= self.budget.allowed

    def batch_losses(self, i: int, run: Runner) -> Iterator[float]:
        """One loss for each sample of a batch."""
        inputs = self.calibration.batches[i]
        if self.quality is not None:
            if i not in self._scores:
                self._scores[i] = self.scores(inputs, self.original(i))
            after = self.scores(inputs, run(inputs))
            yield from (a - b for a, b in zip(self._scores[i], after, strict=True))
            return
        assert self.output is not None
        before, result = self.original(i), run(inputs)
        rows = self.real_rows(inputs, before[self.output])
        for a, b, real in zip(*map(self.samples_of(inputs), (before[self.output], result[self.output])), rows, strict=True):
            kept = real & ~torch.isnan(a).any(-1)
            if bool(kept.any()):
                yield self.metric.loss(a[kept], b[kept])

    def samples_of(self, inputs: Batch) -> Any:
        """A function that cuts an output into its samples, each [rows, C]."""
        size = self.calibration.size(inputs)

        def cut(output: Tensor) -> list[Tensor]:
            parts = list(output) if output.ndim and output.shape[0] == size else [output]
            return [p.reshape(-1, p.shape[-1]) if p.ndim else p.reshape(1, 1) for p in parts]

        return cut

    def real_rows(self, inputs: Batch, output: Tensor) -> list[Tensor]:
        """Which rows of each sample are no padding, bool [rows]."""
        assert self.output is not None
        shape = self._graph.outputs[self.output].shape if self.output < len(self._graph.outputs) else None
        found = self._padding.leading(shape, output, inputs) if shape is not None and len(shape) == output.ndim else None
        whole = torch.ones(output.shape[:-1], dtype=torch.bool)
        if found is not None:
            whole &= found.reshape(*found.shape, *[1] * (whole.ndim - found.ndim))
        return [part[:, 0] for part in self.samples_of(inputs)(whole[..., None])]

    def original(self, i: int) -> list[Tensor]:
        """Outputs of the original on a batch."""
        if i in self._kept:
            return self._kept[i]
        outputs = self._run(self.calibration.batches[i])
        size = sum(t.nbytes for t in outputs)
        if size <= self._left:
            self._kept[i] = outputs
            self._left -= size
        return outputs

    def scores(self, inputs: Batch, outputs: Sequence[Tensor]) -> list[float]:
        """The user's score of each sample of a batch. Raises BudgetError for what is no such score."""
        assert self.quality is not None
        named: Mapping[str, Tensor] = dict(zip(self.names or map(str, range(len(outputs))), outputs, strict=False))
        given = self.quality(inputs, named)
        try:
            scores = torch.as_tensor(given, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise BudgetError(
                f"the quality function returned a {type(given).__name__}, not one number for each sample",
                next_move="Return a float, or a tensor of one score for each sample of the batch.",
            ) from None
        size = self.calibration.size(inputs)
        if len(scores) not in (1, size) or bool(torch.isnan(scores).any()):
            raise BudgetError(
                f"the quality function returned {len(scores)} scores for a batch of {size}"
                if len(scores) not in (1, size)
                else "the quality function returned NaN",
                next_move="Return a float, or a tensor of one score for each sample of the batch.",
            )
        return [float(s) for s in scores]
