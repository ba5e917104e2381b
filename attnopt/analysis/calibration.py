"""Calibration data: read, checked, counted in samples, and cut in a half to choose by and a half to judge by.

    list of dicts or tuples | DataLoader | data.npz   ->   named batches   ->   (to choose, to validate)

A sample is one independent sequence: one index along the batch axis, which is the first dimension that all inputs of two or more
dimensions share, sizes of 1 aside. (Exporters name it differently for each input: dimensions of several names are one where all
batches have equal sizes there.) Where inputs share none, each batch is one sample. A mean loss is only as good as its number
of samples: each half needs LEAST of them, because the bound on a loss is too narrow with fewer (see `plan.quality`).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.dims import Dim, Symbol
from attnopt.ir.graph import Graph

LEAST = 16  # samples in each half
MOST = 4096  # batches that are read from an iterable, which may have no end
HALVES = 4  # so many batches are shared out whole; fewer are cut along the batch axis
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Named batches. axis: the inputs that have the batch axis, always first; empty where it is not known.

    sliced: whether a batch may be cut, because the model takes any batch size.
    """

    batches: tuple[Batch, ...]
    axis: frozenset[str] = frozenset()
    sliced: bool = False

    @classmethod
    def of(cls, graph: Graph, batches: Sequence[Batch]) -> Calibration:
        dims = batch_dims(graph, batches)
        having = [v.name for v in graph.inputs if v.shape and v.shape[0] in dims]
        return cls(tuple(batches), frozenset(having), bool(dims) and not any(isinstance(d, int) for d in dims))

    @property
    def samples(self) -> int:
        return sum(self.size(batch) for batch in self.batches)

    def size(self, batch: Batch) -> int:
        """Samples in one batch."""
        return next((int(batch[name].shape[0]) for name in sorted(self.axis)), 1)

    def split(self, seed: int = 0, least: int = LEAST) -> tuple[Calibration, Calibration]:
        """(to choose by, to validate by): no sample is in both. The same seed gives the same halves.

        Whole batches go to one half, where there are at least HALVES; fewer are cut in two. Raises InputMismatch where a half
        would have fewer than `least` samples.
        """
        random = torch.Generator().manual_seed(seed)
        halves: tuple[list[Batch], list[Batch]] = ([], [])
        if len(self.batches) < HALVES and self.sliced:
            for batch in self.batches:
                order = torch.randperm(self.size(batch), generator=random)
                counts = [sum(self.size(b) for b in half) for half in halves]
                middle = (len(order) + (counts[0] < counts[1])) // 2  # an odd sample goes to the smaller half
                for half, rows in zip(halves, (order[:middle], order[middle:]), strict=True):
                    half.append(self.cut(batch, rows.sort().values))
        else:
            for i in torch.randperm(len(self.batches), generator=random).tolist():
                counts = [sum(self.size(b) for b in half) for half in halves]
                halves[counts[0] > counts[1]].append(self.batches[i])
        parts = tuple(Calibration(tuple(b for b in half if self.size(b)), self.axis, self.sliced) for half in halves)
        if min(part.samples for part in parts) < least:
            raise InputMismatch(
                f"calibration holds {self.samples} samples in {len(self.batches)} batches, too few to choose by one half and "
                "validate by the other",
                where=f"{', '.join(sorted(self.axis)) or 'no input'} along the batch axis",
                next_move=f"Give at least {2 * least} independent sequences; each half needs {least}.",
            )
        return parts[0], parts[1]

    def cut(self, batch: Batch, rows: Tensor) -> Batch:
        """The batch with these samples only."""
        return {name: x[rows] if name in self.axis else x for name, x in batch.items()}

    def pieces(self, most: int) -> Calibration:
        """The same samples in batches of at most so many; as they are where the model takes no other size of batch."""
        if not self.sliced or all(self.size(batch) <= most for batch in self.batches):
            return self
        cuts = [(b, torch.arange(self.size(b)).split(most)) for b in self.batches]
        return Calibration(tuple(self.cut(b, rows) for b, parts in cuts for rows in parts), self.axis, self.sliced)

    @property
    def fingerprint(self) -> str:
        """A key of the contents: equal batches, equal key."""
        made = hashlib.blake2b(digest_size=16)
        for batch in self.batches:
            for name in sorted(batch):
                made.update(described(name, batch[name]))
        return made.hexdigest()


def batch_dims(graph: Graph, batches: Sequence[Batch]) -> frozenset[Dim]:
    """The dimension along which samples lie, under all of its names; empty where there is none."""
    having = [v for v in graph.inputs if v.shape is not None and len(v.shape) > 1 and v.shape[0] != 1]
    dims = frozenset(v.shape[0] for v in having if v.shape)
    if len(dims) < 2:
        return dims
    equal = all(len({batch[v.name].shape[0] for v in having}) == 1 for batch in batches)
    return dims if equal and all(isinstance(d, Symbol) and len(d.names) == 1 for d in dims) else frozenset()


def described(name: str, tensor: Tensor) -> bytes:
    """Everything about a tensor, as bytes to be hashed."""
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
    return head + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_calibration(given: Any, names: Sequence[str], named: Callable[[Any], Batch]) -> list[Batch]:
    """Named, checked batches from what a user gives: a list or iterable of inputs, or the path of an .npz file.

    names: the inputs of the model. named: turns one batch (dict, tuple or tensor) into named tensors, or raises InputMismatch.
    At most MOST batches are read. Raises InputMismatch, which names the batch and the input.
    """
    if isinstance(given, (str, Path)):
        given = read_npz(Path(given), names)
    whole = isinstance(given, (Mapping, Tensor, np.ndarray))  # one batch, not many
    batches = list(islice(given, MOST)) if isinstance(given, Iterable) and not whole else []
    if not batches:
        raise InputMismatch(
            "calibration is not a non-empty list of inputs",
            where=type(given).__name__,
            next_move="Give a list or DataLoader of the same kind of inputs as example_inputs, or the path of an .npz file.",
        )
    made: list[Batch] = []
    for i, batch in enumerate(batches):
        try:
            made.append(named(batch))
            check_values(made[-1])
        except InputMismatch as failure:
            where = f"calibration batch {i}" + f", {failure.where}" * bool(failure.where)
            raise InputMismatch(failure.message, where=where, next_move=failure.next_move) from None
    return made


def check_values(batch: Batch) -> None:
    """Raise InputMismatch for NaN and infinities; a mask or bias may be minus infinity."""
    for name, tensor in batch.items():
        if tensor.numel() == 0:
            raise InputMismatch(f"input '{name}' is empty", where=f"shape {list(tensor.shape)}", next_move="Leave the batch out.")
        if not tensor.is_floating_point():
            continue
        masks = any(word in name.lower() for word in ("mask", "bias"))
        wrong = torch.isnan(tensor) | (tensor == torch.inf) | ((tensor == -torch.inf) & (not masks))
        if count := int(wrong.sum()):
            first = [int(i) for i in wrong.nonzero()[0]]
            raise InputMismatch(
                f"input '{name}' holds {count} values that are NaN or infinite",
                where=f"the first at {first}",
                next_move="Leave those samples out: no loss can be measured on them.",
            )


def read_npz(path: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """One array [samples, …] per input name, cut along the first axis into batches of one."""
    try:
        archive = np.load(path)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array, and no name says which input that is")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as failure:
        raise InputMismatch(
            f"cannot read calibration data: {failure}",
            where=str(path),
            next_move="Save it with numpy.savez(path, input_name=array, …).",
        ) from None
    missing = [n for n in names if n not in arrays]
    if missing:
        raise InputMismatch(
            f"calibration data lacks {', '.join(missing)}",
            where=str(path),
            next_move=f"It holds {', '.join(arrays) or 'nothing'}; the model reads {', '.join(names)}.",
        )
    counts = {name: len(arrays[name]) for name in names}
    if len(set(counts.values())) != 1 or not next(iter(counts.values()), 0):
        raise InputMismatch(
            "calibration arrays differ in their number of samples", where=str(counts), next_move="Make them equal."
        )
    return [{name: torch.from_numpy(arrays[name][i : i + 1]) for name in names} for i in range(next(iter(counts.values())))]
