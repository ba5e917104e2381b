"""The public functions: inspect, optimize, explore, kernels, load; everything below is reached through them or `attnopt.attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.asked import Asked
from attnopt.cost.target import Target
from attnopt.emission import emit_kernels, require_kernels
from attnopt.errors import BudgetError, UnsupportedFormat
from attnopt.hosts.module.model import generates
from attnopt.ir.block import Block
from attnopt.ir.cost import cost
from attnopt.ir.dims import evaluate as evaluate_dim
from attnopt.ir.eviction import Policy
from attnopt.ir.site import Site
from attnopt.opening import Opened, open_model
from attnopt.optimized import Optimized
from attnopt.optimized import load as load_file
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.quality import Score
from attnopt.plan.pipeline import run
from attnopt.report.frontier import Frontier
from attnopt.report.inspection import InspectedSite, Inspection
from attnopt.report.plan import Plan

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel


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
    budget: float | Budget = 0.0,
    calibration: Any = None,
    select: str | None = None,
    passes: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    quality: Score | None = None,
    shapes: str | Sequence[str] | None = None,
    effort: str = "low",
    seed: int = 0,
    plan: Plan | str | Path | None = None,
    cache: str | Path | None = None,
    minimise: str = "time",
    tune: bool = False,
    tokenizer: Any = None,
    host: str | None = None,
    policies: Sequence[str | Policy] | None = None,
) -> Any:
    """Return the same model with its attentions computed by faster kernels; the given model is not touched.

    A transformers model that generates, given without example inputs, comes back as a live model: of its own class, with `generate`,
    `.report`, `.plan` and `.save_pretrained(folder)`, which `load` reads. Any other comes back as an `Optimized`, traced on its inputs.

    target: a name of `attnopt targets`, with a runtime if wanted ("cpu+onnxruntime").
    budget: largest allowed loss, a number in the output's natural metric or a `Budget`; 0 allows exact rewrites only.
    calibration: inputs on which the loss is measured (a list of input dicts, a DataLoader, or a path to .npz). One half chooses the plan;
    on the other the one-sided 95 % bound of the loss is within the budget. Default: the example inputs, for which alone it then holds.
    select: "measure" (time each kernel, keep what is faster), "model" (predict), "always" (every rewrite that holds); default: measure
    where the target is this machine's CPU, or the GPU that the example inputs are on, else predict.
    passes: names to restrict the rewrites to; default all. int8-cache, int4-cache and int2-cache let a live model keep its cache in codes.
    quality: for Budget(metric="quality", drop=…): a function of named inputs and outputs of a batch that returns a score per sample.
    shapes: what the plan is for ("prefill:4096 decode:32768x8"), timed where the model's sizes are open and a call is short; default: the
    example inputs. effort: "low" (about a minute of measuring), "medium", "high" (hours). seed: of the halves and of the bound; equal
    seeds, equal plans, but for timing.
    plan: of an earlier result (`.plan`, or a path to its .json, .onnx or .pt2), applied without a search. Weights that GPTQ rounded are
    read from the file, or rounded again by `calibration`; other data than the plan's give a line in the report.
    cache: a folder for finished measurements, so that an interrupted search goes on; default: that of ATTNOPT_MEASUREMENTS, else none.
    minimise: what the plan makes least within the budget, "time" or "memory" (bytes of weights and key/value caches, at whatever speed).
    tune: also offer rewrites that are fitted to the calibration data: output projections by least squares where heads changed, rounding
    layer after layer; the report says what that recovered. It takes time of the search's; effort "high" does it anyway.
    policies: of the key/value cache (names of `attnopt.cache`), of which a live model is given the one that keeps the fewest bytes within
    the budget; its rewrites are then found in half of it. Default: the whole cache.
    tokenizer: where calibration is a list of texts. host: "module" for a live model, "graph" for a traced one; default: as said above.

    The traced result is called like the model and returns what it returns; `.report` says what was done, `.export(path)` saves. Times
    "before" are those of the given model's own call; where nothing was gained, it is what the result calls.
    Raises AccuracyError rather than return a model that differs beyond the tolerance of its dtype, UnknownTarget,
    UnknownPass, UnreadableModel, UntraceableModel, InputMismatch, BudgetError, WorkloadError, PlanError.
    """
    asked = Asked(
        target, budget, calibration, select, passes, quality, shapes, effort, seed, plan, cache, minimise, tune, policies
    )
    if host not in (None, "module", "graph"):
        raise UnsupportedFormat(f"host={host!r} is neither of module and graph", next_move="Leave it out.")
    if host == "module" or (host is None and example_inputs is None and dynamic_shapes is None and generates(model)):
        from attnopt.live import optimize_live

        return optimize_live(model, asked, tokenizer)
    checked = asked.checked()
    if checked.policies or (checked.plan is not None and checked.plan.keeps_cache):
        raise UnsupportedFormat(
            "a cache policy belongs to a model that generates, and this one is traced",
            next_move="Give a transformers model without example inputs, or leave policies= out, and plans with one.",
        )
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=True)
    own = opened.own_call()
    result, report = run(opened.host, asked.request(opened, checked, own))
    gained = result is not opened.host
    return Optimized(opened, result, report, itself=None if gained else own)  # type: ignore[arg-type]  # a copy of opened.host


def load(path: str | Path) -> Any:
    """Read a model that `export` wrote (or any .onnx or .pt2) as a callable, or the folder of a live model as that model.

    `.report` and `.plan` are the records inside, if any. Raises UnreadableModel.
    """
    if Path(path).is_dir():
        from attnopt.live import load_live

        return load_live(Path(path))
    return load_file(path)


def explore(
    model: Any,
    example_inputs: Any = None,
    *,
    target: str = "cpu",
    calibration: Any = None,
    budget: float | Budget = 0.1,
    select: str | None = None,
    passes: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    quality: Score | None = None,
    shapes: str | Sequence[str] | None = None,
    effort: str = "low",
    seed: int = 0,
    cache: str | Path | None = None,
    tune: bool = False,
) -> Frontier:
    """What a model costs in time and memory for what it may lose: the budget swept up to `budget`, each plan measured.

    The arguments are those of `optimize`; each budget is tightened for a part of the effort's seconds again. Returns a Frontier:
    `.points` (each with its `.plan`, for `optimize(plan=…)`), `.save(path)` for a page with a picture; it prints as a table. A point
    holds its budget as `optimize` does, times are shares of the original's, and a larger budget is never slower than a smaller one.
    Raises BudgetError for a budget of 0, and what `optimize` raises.
    """
    from attnopt.plan.frontier import explored
    from attnopt.plan.pipeline import exact_setting

    asked = Asked(target, budget, calibration, select, passes, quality, shapes, effort, seed, None, cache, tune=tune)
    checked = asked.checked()
    if checked.budget.exact:
        raise BudgetError("a budget of 0 leaves nothing to explore", next_move="Leave it out to sweep up to 0.1.")
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=True)
    name = Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
    return explored(exact_setting(opened.host, asked.request(opened, checked, opened.own_call())), name)


def kernels(
    model: Any,
    folder: str | Path,
    *,
    target: str,
    dtype: str | None = None,
    cpu: str | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> tuple[SiteKernel, ...]:
    """Write for each distinct attention of a model a kernel: by Triton for a GPU, which need not be here, by TVM for a CPU.

    dtype: of q, k and v in the kernels ("float16", "bfloat16", "float32"); default: as in the model.
    cpu: with the target "cpu", another one than this machine's, as LLVM names it ("haswell", "apple-m1").
    Per kernel for a GPU: a Python file that imports torch and triton only, assembly, binary, a JSON of resources, and an example.
    For a CPU: TVMScript, a library, a Python file that calls it and needs numpy or torch and TVM's runtime, an example, a JSON, and
    CUDA source of the same spec. The folder is made where it is missing. Returns what was written or refused, and for which sites.
    """
    machine = require_kernels(target, cpu)
    opened = open_model(model, example_inputs, dynamic_shapes=dynamic_shapes, need_inputs=False)
    return emit_kernels(opened, folder, machine, dtype)


def calibrate(folder: str | Path | None = None, *, progress: Callable[[str, float], None] | None = None) -> Target:
    """Measure this machine for a minute or two and keep what was found, so that predictions for `cpu` are about it.

    folder: where the file goes; default: the user's folder of configuration, or that of the environment variable ATTNOPT_CONFIG.
    progress: told what is measured now, and the share of the work that is done (0 to 1).
    Returns the target. Raises OutputNotWritable. An interrupt leaves what was there before.
    """
    from attnopt.plan.calibrate.calibrate import calibrate as measure

    target, _ = measure(None if folder is None else Path(folder), said=progress or (lambda what, done: None))
    return target


__all__ = ["Budget", "Optimized", "calibrate", "explore", "inspect", "kernels", "load", "optimize"]
