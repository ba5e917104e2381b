"""Finished measurements on disk, so that interrupted work goes on where it stopped.

    store.put(key, tensors)   ->   FOLDER/key.npz, whole or not at all          store.get(key)   ->   the same tensors, bit by bit

Files are named by a hash of all that a measurement depends on (the model, its weights, the data, what is measured), so a changed
model finds nothing and a wrong answer cannot be read back. The folder is the one given, else that of the environment variable
ATTNOPT_MEASUREMENTS; without either nothing is written. A file is written under another name and then renamed. Where writing fails (a full
disk) the measurement goes on in memory, `failure` says why, and what is on disk stays as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnopt.analysis.calibration import described
from attnopt.errors import OutputNotWritable
from attnopt.ir.graph import Graph

VARIABLE = "ATTNOPT_MEASUREMENTS"
VERSION = 1  # of what is measured: counts up when a statistic changes its meaning


@dataclass
class Store:
    """A folder of measurements; with folder=None nothing is kept. failure: why the last write failed, if one did."""

    folder: Path | None = None
    failure: str = ""

    @classmethod
    def open(cls, folder: str | Path | None = None) -> Store:
        """The folder given, or that of ATTNOPT_MEASUREMENTS, made where it is missing. Raises OutputNotWritable."""
        chosen = folder or os.environ.get(VARIABLE)
        if not chosen:
            return cls()
        path = Path(chosen)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise OutputNotWritable(
                f"the folder '{path}' for measurements cannot be made: {failure.strerror}",
                where=VARIABLE if not folder else "",
                next_move="Choose another, or none: measurements then last as long as the process.",
            ) from None
        return cls(path)

    def path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npz"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under this key; None where nothing was, or the file is damaged."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as held:
                return {name: torch.from_numpy(held[name]) for name in held.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(key)
        if path is None:
            return
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
                temporary = Path(file.name)
                np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
            temporary.replace(path)
        except OSError as failure:
            self.failure = f"a measurement was not kept in '{path.parent}': {failure.strerror or failure}"
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def drop(self, key: str) -> None:
        path = self.path(key)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def key_of(*parts: str) -> str:
    """A name for a measurement that depends on these."""
    return hashlib.blake2b("\0".join((str(VERSION), *parts)).encode(), digest_size=16).hexdigest()


def fingerprint(graph: Graph) -> str:
    """A key of a model's contents: its graph and the data of all its constants."""
    made = hashlib.blake2b(str(graph).encode(), digest_size=16)
    seen: set[int] = set()
    for inner in graph.nested():
        for node in inner.nodes:
            for value in node.inputs:
                if value is not None and value.load is not None and id(value) not in seen:
                    seen.add(id(value))
                    made.update(described(value.name, value.load()))
    return made.hexdigest()
