"""One pass over the calibration data for a group of measures: tap what they read, add it up, keep the result.

    batches  --tap-->  values of a group  --add-->  states  --finished-->  store

Memory is bounded: what is tapped for one batch and the states of the group together stay under `memory` bytes, by measuring as many
measures at a time as fit (always at least one). A group that is interrupted saves its states and the number of batches they hold,
and goes on from there: the result is bit by bit the same, because every batch is added once and in order. Where time is up a group ends
with the batches that it has; what they say is handed out, and kept only as half done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attnopt.analysis.calibration import Batch
from attnopt.analysis.progress import progress
from attnopt.analysis.store import Store, key_of
from attnopt.ir.dims import evaluate
from attnopt.ir.graph import Value
from attnopt.ir.site import Host

MEMORY = 512 * 2**20  # bytes of taps and states at a time
EVERY = 30.0  # seconds between two saves of what is half done
WIDTHS = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "bool": 1, "int8": 1, "uint8": 1}  # bytes; others have 4


class Measure(Protocol):
    """Something that is added up over batches. key: of what it measures, as a file name."""

    @property
    def key(self) -> str: ...

    @property
    def reads(self) -> tuple[Value, ...]:
        """What is tapped."""
        ...

    @property
    def size(self) -> int:
        """Bytes of its state, and of what it takes to add one batch."""
        ...

    def add(self, held: Mapping[Value, Tensor], inputs: Batch) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...

    def result(self) -> dict[str, Tensor]: ...


@dataclass
class Sweep:
    """What all measures share: the host, its data, where results are kept, and how much memory they may take.

    late: whether time is up, asked after each batch. cut: what was measured on fewer batches than there are, in words.
    """

    host: Host
    batches: Sequence[Batch]
    store: Store
    memory: int = MEMORY
    late: Callable[[], bool] = lambda: False
    cut: list[str] = field(default_factory=list)

    def measured(self, measures: Iterable[Measure], title: str) -> Iterator[tuple[Measure, dict[str, Tensor]]]:
        """Each measure with its result, group by group: what the store holds is read, the rest is measured and stored."""
        for group in self.groups(measures):
            results = {m.key: self.store.get(m.key) for m in group}
            missing = [m for m in group if results[m.key] is None]
            if missing:
                done = self.gather(missing, f"{title} ({len(missing)})")
                for measure in missing:
                    results[measure.key] = measure.result()
                    if done == len(self.batches):
                        self.store.put(measure.key, measure.result())
                if done == len(self.batches):
                    self.store.drop(partial(missing))
                else:
                    self.cut.append(f"{title} ({len(missing)}): {done} of {len(self.batches)} batches")
            for measure in group:
                result = results[measure.key]
                assert result is not None
                yield measure, result

    def groups(self, measures: Iterable[Measure]) -> Iterator[list[Measure]]:
        """As many neighbours at a time as memory holds."""
        largest = max(self.batches, key=lambda b: sum(x.numel() for x in b.values()))
        sizes = self.host.graph.sizes(largest)
        group: list[Measure] = []
        tapped: set[Value] = set()
        taken = 0
        for measure in measures:
            more = measure.size + sum(bytes_of(v, sizes) for v in measure.reads if v not in tapped)
            if group and taken + more > self.memory:
                yield group
                group, tapped = [], set()
                more = measure.size + sum(bytes_of(v, sizes) for v in measure.reads)
                taken = 0
            group.append(measure)
            tapped.update(measure.reads)
            taken += more
        if group:
            yield group

    def gather(self, group: Sequence[Measure], title: str) -> int:
        """Add up all batches, from where an earlier run stopped; at least one, and not all where time is up. How many it was."""
        reads = list(dict.fromkeys(v for m in group for v in m.reads))
        tap = self.host.tapper(reads)
        done = self.resume(group)
        saved, whole = time.monotonic(), True
        try:
            for inputs in progress(self.batches[done:], title):
                held = dict(zip(reads, tap(inputs), strict=True))
                whole = False
                for measure in group:
                    measure.add(held, inputs)
                done, whole = done + 1, True
                if time.monotonic() - saved > EVERY:
                    self.save(group, done)
                    saved = time.monotonic()
                if done < len(self.batches) and self.late():
                    self.save(group, done)
                    break
        except BaseException:
            if whole:  # an interrupt between two additions leaves states that hold a part of a batch: the last save is good
                self.save(group, done)
            raise
        return done

    def resume(self, group: Sequence[Measure]) -> int:
        """How many batches an earlier run added, after its states are restored."""
        held = self.store.get(partial(group))
        if held is None:
            return 0
        for measure in group:
            start = f"{measure.key}/"
            measure.restore({name.removeprefix(start): x for name, x in held.items() if name.startswith(start)})
        return int(held["done"])

    def save(self, group: Sequence[Measure], done: int) -> None:
        if done and self.store.folder is not None:
            states = {f"{m.key}/{name}": x for m in group for name, x in m.state().items()}
            self.store.put(partial(group), {"done": torch.tensor(done), **states})


def partial(group: Sequence[Measure]) -> str:
    """The key of half done work on just these measures."""
    return key_of("partial", *(m.key for m in group))


def bytes_of(value: Value, sizes: Mapping[str, int]) -> int:
    """What a tensor takes in memory at these sizes; 1 MiB where its shape is not known."""
    try:
        count = 1
        for dim in value.shape or ():
            count *= evaluate(dim, sizes)
    except KeyError:
        return 2**20
    return count * WIDTHS.get(value.dtype, 4) if value.shape is not None else 2**20
