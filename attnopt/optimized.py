"""What `optimize` returns and `load` reads back: a model to call, its report, and how to save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attnopt.errors import UnsupportedFormat
from attnopt.hosts.fx import FxHost, load_pt2
from attnopt.hosts.onnx import OnnxHost
from attnopt.opening import Opened
from attnopt.report.data import Report

METADATA_KEY = "attnopt.report"


class Optimized:
    """An optimised model. Call it like the original; `report` prints; `export(path)` writes .onnx or .pt2."""

    def __init__(self, opened: Opened, host: FxHost | OnnxHost, report: Report) -> None:
        self.report = report
        self._opened = opened
        self._host = host
        self._call = host.callable()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def module(self) -> Any:
        """The optimised torch module (torch models only)."""
        return self._call

    def export(self, path: str | Path) -> Path:
        """Write the model: .onnx, or .pt2 for torch models. Nothing is left behind where writing fails.

        Raises UnsupportedFormat for another suffix and OutputNotWritable where the place cannot be written.
        """
        target = Path(path)
        metadata = {METADATA_KEY: json.dumps(self.report.to_json())}
        if target.suffix == ".onnx":
            onnx_host(self._host).save(target, metadata)
        elif target.suffix == ".pt2" and isinstance(self._host, FxHost):
            self._host.save_pt2(target, metadata)
        else:
            raise UnsupportedFormat(
                f"cannot write a {self._host.kind} model as '{target.suffix}'",
                next_move="Use .onnx, or .pt2 for a model that came from torch.",
            )
        return target


def onnx_host(host: FxHost | OnnxHost) -> OnnxHost:
    """The ONNX form of a host: a torch model is exported and its attentions fused again for onnxruntime."""
    if isinstance(host, OnnxHost):
        return host
    from attnopt.patterns import recognise
    from attnopt.plan.choose import apply_choices, choose

    exported = OnnxHost.from_model(host.to_onnx())
    sites = recognise(exported.graph).sites
    chosen = choose(exported, sites, None, runtime="onnxruntime", opset=exported.opset, select="always")
    return apply_choices(exported, chosen)  # type: ignore[return-value]


class Loaded:
    """A model read back from a file, callable like the original."""

    def __init__(self, call: Any, metadata: dict[str, str]) -> None:
        self._call = call
        self.report: dict[str, Any] | None = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def load(path: str | Path) -> Loaded:
    """Read a model that `export` wrote (or any .onnx or .pt2) as a callable; `.report` is the record inside, if any."""
    source = Path(path)
    if source.suffix == ".pt2":
        return Loaded(*load_pt2(source))
    host = OnnxHost.from_model(source)
    return Loaded(host.callable(), host.metadata)
