"""What `optimize` returns and `load` reads back: a model to call, its report, and how to save it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnopt.cost.target import load_target
from attnopt.emission import emit_kernels, require_kernels
from attnopt.errors import AccuracyError, UnsupportedFormat
from attnopt.hosts.fx import FxHost, load_pt2
from attnopt.hosts.fx.own_call import Itself, OwnCall
from attnopt.hosts.onnx import OnnxHost
from attnopt.opening import Opened
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, choose
from attnopt.plan.folding import Folded, carried, fold_steps
from attnopt.plan.judge.quality import natural_metric
from attnopt.plan.judge.verify import difference, require_equal, require_rounded_alike
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.replay import moves_from, transferred
from attnopt.report.data import Report
from attnopt.report.embedded import embedded, extracted
from attnopt.report.plan import Plan, PlanStep
from attnopt.rounding.weight_format import WeightFormat

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel

METADATA_KEY, PLAN_KEY = "attnopt.report", "attnopt.plan"


class Optimized:
    """An optimised model. Call it like the original; `report` prints; `export(path)` writes .onnx or .pt2."""

    def __init__(self, opened: Opened, host: FxHost | OnnxHost, report: Report, itself: OwnCall | None = None) -> None:
        """itself: the given model, where it is called as it was."""
        self.report = report
        self._opened = opened
        self._host = host
        self._call = host.callable() if itself is None else Itself(itself)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    @property
    def plan(self) -> Plan:
        """What was done, to be applied again: `attnopt.optimize(model, plan=fast.plan)`."""
        assert self.report.plan is not None
        return self.report.plan

    @property
    def module(self) -> Any:
        """The optimised torch module (torch models only)."""
        return self._call

    def export(self, path: str | Path) -> Path:
        """Write the model: .onnx, or .pt2 for torch models. Nothing is left behind where writing fails.

        Raises UnsupportedFormat for another suffix and OutputNotWritable where the place cannot be written.
        """
        target = Path(path)
        metadata = {METADATA_KEY: embedded(self.report.to_json()), PLAN_KEY: embedded(self.plan.to_json())}
        if target.suffix == ".onnx":
            if isinstance(self._host, OnnxHost):
                self._host.save(target, metadata)
            else:
                host, plan = as_onnx(self._opened, self._host, self.report)
                host.save(target, {**metadata, PLAN_KEY: embedded(plan.to_json())})
        elif target.suffix == ".pt2" and isinstance(self._host, FxHost):
            self._host.save_pt2(target, metadata)
        else:
            raise UnsupportedFormat(
                f"cannot write a {self._host.kind} model as '{target.suffix}'",
                next_move="Use .onnx, or .pt2 for a model that came from torch.",
            )
        return target

    def kernels(
        self, folder: str | Path, *, target: str | None = None, dtype: str | None = None, cpu: str | None = None
    ) -> tuple[SiteKernel, ...]:
        """Write a kernel for each distinct attention of the model, as `attnopt kernels` does for a file.

        target: where the kernels shall run; default: what the model was optimised for. dtype: of q, k and v; default: the model's.
        cpu: with the target cpu, another one than this machine's, as LLVM names it ("haswell").
        Returns what was written or refused, and for which sites. Raises UnsupportedFormat for a target without such kernels.
        """
        return emit_kernels(self._opened, folder, require_kernels(target or self.report.target, cpu), dtype)


def as_onnx(opened: Opened, host: FxHost, report: Report) -> tuple[OnnxHost, Plan]:
    """The ONNX form of an optimised torch model, and its plan: exported as it was, its plan applied for onnxruntime, and compared.

    Kernels are chosen as they were for torch (`report.select`), but among onnxruntime's and, where measured, by its times; none where
    none was to be chosen for torch.

    What the file computes is what the optimised torch model computes: within the tolerance of its dtype, or, where the plan rounds to
    codes, within a small share of what that rounding changes. The budget has held for the torch model already; where the two runtimes
    round further apart, as through many layers, it has to hold for the file on the example inputs too.

    Raises AccuracyError where that is not so, UnsupportedFormat and PlanError where the file cannot be made.
    """
    original = opened.host
    assert isinstance(original, FxHost)
    exported = OnnxHost.from_model(original.to_onnx())
    inputs = original.example_inputs()
    before = report.plan
    folds, others = fold_steps(before.steps) if before is not None else ((), ())
    folded = Folded(exported)
    if others:  # they are of the folded model; folds alone are a matter of the runtime, and saved time in torch
        one, folded = carried(folds, original, exported)
        assert isinstance(one.host, FxHost) and isinstance(folded.host, OnnxHost)
        original, exported = one.host, folded.host
    sites = recognise(exported.graph).sites
    timed = by_position(exported, inputs) if report.select == "measure" else None
    own = sites if report.fuses else ()  # else each attention keeps the nodes that torch's exporter writes
    chosen = choose(exported, own, timed, runtime="onnxruntime", opset=exported.opset, select=report.select)
    steps = transferred(others, original, exported) if others else []
    kernels = {c.site.name: c.lowering for c in chosen if c.lowering is not None}
    named = by_position(exported, inputs)
    shop = Workshop(exported, kernels, load_target(report.target)[0], "onnxruntime", exported.opset, exported.graph.sizes(named))

    def made(some: Sequence[PlanStep]) -> Any:
        return shop.built(moves_from(some, exported)) if some else apply_choices(exported, chosen)

    result = made(steps)
    wanted, got = host.runner()(inputs), result.runner()(named)
    if any(step.rounds for step in steps):
        try:
            require_rounded_alike(wanted, got, made([step for step in steps if not step.rounds]).runner()(named))
        except AccuracyError:
            require_within(report, opened.output_name, opened.host.runner()(inputs), got)
    else:
        require_equal(wanted, got)
    done = (*folded.steps, *steps)
    plan = Plan("onnx", report.target, "onnxruntime", {name: x.name for name, x in kernels.items()}, done, report.budget)
    return result, plan


def require_within(report: Report, name: str, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """AccuracyError where a file with layers in codes loses more than the budget on the example inputs; a line where it does not.

    onnxruntime's kernel for layers in few bits rounds their inputs to 8 bits as well. Where both runtimes do, numbers beside the border
    of two codes fall to either side, and through many layers nearly all of them differ somewhere.
    """
    real, other = (next(t for t in some if t.is_floating_point()) for some in (wanted, got))
    metric = natural_metric(name, real)
    loss = metric.loss(real, other)
    if report.search is None or metric.name != report.search.metric or not loss <= report.budget:
        found = difference(wanted, got, exact=False)
        raise AccuracyError(found.max_abs, found.max_rel, report.budget)
    line = "onnxruntime rounds otherwise than torch: on the example inputs the file loses %s %.2g, budget %g"
    logging.getLogger("attnopt").warning(line, metric.name, loss, report.budget)


def by_position(host: OnnxHost, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs under the names of the ONNX model: torch calls `input` input_1, because Python has an `input` of its own."""
    return dict(zip((spec.name for spec in host.input_specs), inputs.values(), strict=True))


class Loaded:
    """A model read back from a file, callable like the original."""

    def __init__(self, call: Any, metadata: dict[str, str]) -> None:
        self._call = call
        self.report: dict[str, Any] | None = extracted(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
        self.plan = Plan.from_json(extracted(metadata[PLAN_KEY])) if PLAN_KEY in metadata else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def load(path: str | Path) -> Loaded:
    """Read a model that `export` wrote (or any .onnx or .pt2) as a callable; `.report` and `.plan` are the records inside, if any."""
    source = Path(path)
    host: FxHost | OnnxHost
    if source.suffix == ".pt2":
        host, metadata = load_pt2(source)
    else:
        host = OnnxHost.from_model(source)
        metadata = host.metadata
    loaded = Loaded(host.callable(), metadata)
    if loaded.plan is not None:
        loaded.plan = loaded.plan.with_arrays(lambda step: host.stored_codes(formats(step)))
    return loaded


def formats(step: PlanStep) -> dict[str, WeightFormat]:
    """The layers that a step stores in few bits."""
    found = {name: WeightFormat.read(text) for name, text in step.storage.items()}
    return {name: format for name, format in found.items() if format is not None}
