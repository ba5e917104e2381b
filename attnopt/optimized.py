"""What `optimize` returns and `load` reads back: a model to call, its report, and how to save it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnopt.emission import emit_kernels, require_kernels
from attnopt.errors import AccuracyError, UnsupportedFormat
from attnopt.hosts.fx import FxHost, load_pt2
from attnopt.hosts.onnx import OnnxHost
from attnopt.opening import Opened
from attnopt.passes import DynamicInt8
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, choose
from attnopt.plan.quality import first_floating, measured_loss, natural_metric
from attnopt.plan.verify import difference, require_equal
from attnopt.report.data import Report

if TYPE_CHECKING:
    from attnopt.codegen.triton.site_kernels import SiteKernel

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
            host = self._host if isinstance(self._host, OnnxHost) else as_onnx(self._opened, self._host, self.report)
            host.save(target, metadata)
        elif target.suffix == ".pt2" and isinstance(self._host, FxHost):
            self._host.save_pt2(target, metadata)
        else:
            raise UnsupportedFormat(
                f"cannot write a {self._host.kind} model as '{target.suffix}'",
                next_move="Use .onnx, or .pt2 for a model that came from torch.",
            )
        return target

    def kernels(self, folder: str | Path, *, target: str | None = None, dtype: str | None = None) -> tuple[SiteKernel, ...]:
        """Write a Triton kernel for each distinct attention of the model, as `attnopt kernels` does for a file.

        target: where the kernels shall run; default: what the model was optimised for. dtype: of q, k and v; default: the model's.
        Returns what was written or refused, and for which sites. Raises UnsupportedFormat for a target without such kernels.
        """
        architecture = require_kernels(target or self.report.target)
        return emit_kernels(self._opened, folder, architecture, dtype)


def as_onnx(opened: Opened, host: FxHost, report: Report) -> OnnxHost:
    """The ONNX form of an optimised torch model: exported as it was, fused and quantised again for onnxruntime, and compared.

    Kernels are chosen as they were for torch (`report.select`), but among onnxruntime's and, where measured, by its times.

    Raises AccuracyError where the file would not compute what the torch model does, UnsupportedFormat where it cannot be made.
    """
    original = opened.host
    assert isinstance(original, FxHost)
    exported = OnnxHost.from_model(original.to_onnx())
    inputs = original.example_inputs()
    sites = recognise(exported.graph).sites
    named = by_position(exported, inputs) if report.select == "measure" else None
    chosen = choose(exported, sites, named, runtime="onnxruntime", opset=exported.opset, select=report.select)
    result: Any = apply_choices(exported, chosen)
    if host.quantized:
        before, after = (DynamicInt8().layers(h.graph) for h in (original, result))
        if len(before) != len(after):
            raise UnsupportedFormat(
                f"the ONNX export has {len(after)} linear layers where the torch model has {len(before)}, so int8 cannot be carried over",
                next_move="Export as .pt2, or export the original to ONNX and optimise that file with the budget.",
            )
        result = result.copy()
        names = [new.name for old, new in zip(before, after, strict=True) if old.name in host.quantized]
        result.quantize_linears([n for n in DynamicInt8().layers(result.graph) if n.name in names])
        result.finish()
    wanted, got = original.runner()(inputs), result.runner()(by_position(result, inputs))
    if host.quantized:
        metric = natural_metric(opened.output_name, first_floating(wanted))
        loss = measured_loss(metric, [wanted], [got])
        if loss > report.budget:
            raise AccuracyError(*worst(wanted, got), report.budget)
    else:
        require_equal(wanted, got)
    return result  # type: ignore[no-any-return]


def by_position(host: OnnxHost, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs under the names of the ONNX model: torch calls `input` input_1, because Python has an `input` of its own."""
    return dict(zip((spec.name for spec in host.input_specs), inputs.values(), strict=True))


def worst(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[float, float]:
    found = difference(wanted, got, exact=False)
    return found.max_abs, found.max_rel


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
