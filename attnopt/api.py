"""The public functions: inspect, optimize, kernels, load. Everything below is reached through them or through `attnopt.attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cost.target import Target, load_target
from attnopt.errors import BudgetError, OutputNotWritable, UnknownPass, UnsupportedFormat
from attnopt.ir.block import Block
from attnopt.ir.cost import cost
from attnopt.ir.dims import evaluate as evaluate_dim
from attnopt.ir.site import Site
from attnopt.opening import Opened, open_model
from attnopt.optimized import Optimized, load
from attnopt.passes import ALL, Pass
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.pipeline import Request, run
from attnopt.report.inspection import InspectedSite, Inspection

if TYPE_CHECKING:
    from attnopt.codegen.triton.site_kernels import SiteKernel

SELECTS = ("measure", "model", "always")


def inspect(model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> Inspection:
    """Find every attention of a model; nothing is changed.

    model: nn.Module, ExportedProgram, FX GraphModule, onnx.ModelProto, or a path to .onnx or .pt2.
    example_inputs: tuple of positional or dict of keyword arguments; may be left out where they can be derived.
    Returns an object with `.sites` (name, spec, block, steps, source) and `.refusals` (reason, node) that prints as a table.
    """
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=False)
    found = recognise(opened.host.graph)
    blocks = find_blocks(opened.host.graph, found.sites)
    sites = tuple(inspected(s, b, opened) for s, b in zip(found.sites, blocks, strict=True))
    return Inspection(sites, found.refusals)


def inspected(site: Site, block: Block, opened: Opened) -> InspectedSite:
    sizes = opened.symbols()
    try:
        shape = {axis: evaluate_dim(dim, sizes) for axis, dim in site.shape.items()}
    except KeyError:  # a length that only running the model would tell
        return InspectedSite(site, block=block)
    priced = cost(site.spec, shape, site.q.value.dtype or "float32")
    return InspectedSite(site, priced.flops, priced.bytes, block)


def optimize(
    model: Any,
    example_inputs: Any = None,
    *,
    target: str = "cpu",
    budget: float = 0.0,
    calibration: Any = None,
    select: str | None = None,
    passes: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Optimized:
    """Return the same model with its attentions computed by faster kernels; the given model is not touched.

    target: a name of `attnopt targets`, with a runtime if wanted ("cpu+onnxruntime").
    budget: largest allowed loss in the output's natural metric; 0 allows exact rewrites only.
    calibration: inputs on which the loss is measured (a list of input dicts, or a path to .npz); default: the example inputs.
    select: "measure" (time each kernel, keep what is faster; default), "model" (predict), "always" (every exact rewrite).
    passes: names to restrict the rewrites to; default all.

    The result is called like the model and returns what it returns; `.report` says what was done, `.export(path)` saves.
    Raises AccuracyError rather than return a model that differs beyond the tolerance of its dtype, UnknownTarget,
    UnknownPass, UnreadableModel, UntraceableModel, InputMismatch, BudgetError.
    """
    machine, runtime = load_target(target)
    chosen = passes_named(passes)
    if not isinstance(budget, (int, float)) or not 0 <= budget < float("inf"):
        raise BudgetError(f"budget {budget!r} is not a number of at least 0", next_move="Give 0 for exact rewrites only.")
    if select is not None and select not in SELECTS:
        raise BudgetError(f"select={select!r} is none of {', '.join(SELECTS)}", next_move="Leave it out to measure.")
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=True)
    request = Request(
        target=machine.name,
        runtime=runtime or opened.runtime,
        opset=opened.opset,
        select=select or ("measure" if machine.name == "cpu" else "model"),
        budget=float(budget),
        passes=chosen,
        inputs=opened.inputs,
        calibration=opened.batches(calibration),
        output_name=opened.output_name,
    )
    host, report = run(opened.host, request)
    return Optimized(opened, host, report)  # type: ignore[arg-type]  # a copy of opened.host


def kernels(
    model: Any,
    folder: str | Path,
    *,
    target: str,
    dtype: str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> tuple[SiteKernel, ...]:
    """Write for each distinct attention of a model a Triton kernel for a GPU, which need not be here.

    dtype: of q, k and v in the kernels ("float16", "bfloat16", "float32"); default: as in the model.
    Per kernel: a Python file that imports torch and triton only, assembly, binary, a JSON of resources, and an example. The folder
    is made where it is missing. Returns what was written or refused, and for which sites.
    """
    from attnopt.codegen.triton.availability import missing
    from attnopt.codegen.triton.site_kernels import write_kernels
    from attnopt.codegen.triton.tiles import ARCHITECTURES

    machine, _ = load_target(target)
    if machine.arch not in ARCHITECTURES:
        raise UnsupportedFormat(f"there are no Triton kernels for '{machine.name}'", next_move="Name a target with a GPU: h200.")
    if (reason := missing()) is not None:
        raise UnsupportedFormat(reason, next_move="Install it: pip install triton.")
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=False)
    sites = recognise(opened.host.graph).sites
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as failure:
        raise OutputNotWritable(
            f"the folder '{folder}' cannot be made: {failure.strerror}", next_move="Choose another."
        ) from None
    return write_kernels(sites, machine.arch, Path(folder), dtype)


def calibrate(folder: str | Path | None = None, *, progress: Callable[[str, float], None] | None = None) -> Target:
    """Measure this machine for about a minute and keep what was found, so that predictions for `cpu` are about it.

    folder: where the file goes; default: the user's folder of configuration, or that of the environment variable ATTNOPT_CONFIG.
    progress: told what is measured now, and the share of the work that is done (0 to 1).
    Returns the target. Raises OutputNotWritable. An interrupt leaves what was there before.
    """
    from attnopt.plan.calibrate import calibrate as measure

    target, _ = measure(None if folder is None else Path(folder), said=progress or (lambda what, done: None))
    return target


def passes_named(names: Sequence[str] | None) -> tuple[Pass, ...]:
    if names is None:
        return ALL
    known = {p.name: p for p in ALL}
    for name in names:
        if name not in known:
            raise UnknownPass(name, list(known))
    return tuple(p for p in ALL if p.name in names)


__all__ = ["Optimized", "calibrate", "inspect", "kernels", "load", "optimize"]
