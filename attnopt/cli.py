"""The command line: inspect, optimize, explore, plan, kernels, calibrate, targets, passes.

Every AttnoptError ends as one line on standard error and exit code 2; other exceptions pass through. Tables and JSON
alone go to standard output: what libraries print while they work goes to standard error. Commands import what they need
when they run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt import __version__
from attnopt.errors import AttnoptError, OutputNotWritable, UnsupportedFormat

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Find every attention in a model, understand it, and make it faster without losing accuracy unseen.",
)
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .pt2 file.")]
TargetName = Annotated[
    str, typer.Option("--target", help="A name of `attnopt targets`, with a runtime if wanted: cpu+onnxruntime.")
]
CalibrationPath = Annotated[
    Path | None, typer.Option("--calibration", help="An .npz with one array per input: what the loss is measured on.")
]
PassNames = Annotated[
    list[str] | None, typer.Option("--passes", help="Names of passes to restrict to, separated by commas or repeated.")
]
Shapes = Annotated[str | None, typer.Option("--shapes", help="What the plan is for: 'prefill:4096 decode:32768x8'.")]
Tune = Annotated[bool, typer.Option("--tune", help="Also offer rewrites that are fitted to the calibration data.")]
EffortName = Annotated[str, typer.Option("--effort", help="low (a minute of measuring), medium, or high (hours).")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="A folder for finished measurements, so that an interrupted search goes on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def show(thing: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(thing)


@app.command()
def inspect(
    model: ModelPath,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what stands around each attention, and what near misses lack.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the attentions of a model: place, spec, shape, cost."""
    from attnopt.api import inspect as inspect_model

    with redirect_stdout(sys.stderr):
        found = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    show(found)
    if explain:
        show(found.explain())


@app.command()
def optimize(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result: .onnx, or .pt2 for a .pt2 model.")],
    target: TargetName = "cpu",
    budget: Annotated[float, typer.Option(help="Largest allowed loss; 0 allows exact rewrites only.")] = 0.0,
    metric: Annotated[str, typer.Option(help="What the budget is in: natural, kl, cosine, relative, or quality.")] = "natural",
    drop: Annotated[float | None, typer.Option(help="With --quality: by how much the score may fall.")] = None,
    quality: Annotated[str | None, typer.Option(help="A score to keep: FILE.py:FUNCTION, of named inputs and outputs.")] = None,
    calibration: CalibrationPath = None,
    select: Annotated[str | None, typer.Option(help="measure, model or always: how kernels are chosen.")] = None,
    passes: PassNames = None,
    shapes: Shapes = None,
    effort: EffortName = "low",
    seed: Annotated[int, typer.Option(help="Of the halves of the calibration data and of the bound.")] = 0,
    plan: Annotated[Path | None, typer.Option(help="Apply the plan in this .json, .onnx or .pt2, without a search.")] = None,
    cache: CacheFolder = None,
    minimise: Annotated[
        str, typer.Option(help="What is made least within the budget: time, or memory (weights and cache).")
    ] = "time",
    tune: Tune = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say for each group what was considered, and why it lost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a faster model, and say what was done, why, and what it cost."""
    from attnopt.api import optimize as optimize_model
    from attnopt.score_file import score_in

    require_writable(output, model)
    with redirect_stdout(sys.stderr):
        result = optimize_model(
            model,
            target=target,
            budget=budget_of(budget, metric, drop),
            calibration=calibration,
            select=select,
            passes=names_of(passes),
            quality=None if quality is None else score_in(quality),
            shapes=shapes,
            effort=effort,
            seed=seed,
            plan=plan,
            cache=cache,
            minimise=minimise,
            tune=tune,
        )
        result.export(output)
    if as_json:
        typer.echo(json.dumps(result.report.to_json(), indent=2))
        return
    show(result.report)
    if explain:
        show(result.report.explain())
    typer.echo(f"written to {output}")


@app.command()
def explore(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the page: .html.")],
    target: TargetName = "cpu",
    budget: Annotated[float, typer.Option(help="The largest loss that is looked at.")] = 0.1,
    calibration: CalibrationPath = None,
    passes: PassNames = None,
    shapes: Shapes = None,
    effort: EffortName = "low",
    cache: CacheFolder = None,
    tune: Tune = False,
    as_json: AsJson = False,
) -> None:
    """Draw what the model costs in time and memory for what it may lose."""
    from attnopt.api import explore as explore_model

    require_place(output, (".html",), "an .html page")
    with redirect_stdout(sys.stderr):
        frontier = explore_model(
            model,
            target=target,
            budget=budget,
            calibration=calibration,
            passes=names_of(passes),
            shapes=shapes,
            effort=effort,
            cache=cache,
            tune=tune,
        )
        frontier.save(output)
    if as_json:
        typer.echo(json.dumps(frontier.to_json(), indent=2))
        return
    show(frontier)
    typer.echo(f"written to {output}")


plans = typer.Typer(no_args_is_help=True, help="Plans, which travel inside optimised models.")
app.add_typer(plans, name="plan")


@plans.command(name="show")
def show_plan(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx or .pt2 that attnopt wrote, or a plan in .json.")],
    as_json: AsJson = False,
) -> None:
    """Print the plan inside a file; with --json in the form that `optimize --plan` reads."""
    from attnopt.asked import plan_from

    found = plan_from(model)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        show(found)


@app.command()
def kernels(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    target: Annotated[str, typer.Option(help="A name of `attnopt targets`: Triton kernels for a GPU, TVM's for cpu.")],
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; as in the model where it is left out.")] = None,
    cpu: Annotated[
        str | None, typer.Option(help="With --target cpu: another CPU than this one, as LLVM names it: haswell.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a kernel for each distinct attention of a model: source, binary, how to call it, resources."""
    from attnopt.api import kernels as write_kernels
    from attnopt.report.kernels import kernel_rows, kernel_table

    with redirect_stdout(sys.stderr):
        made = write_kernels(model, output, target=target, dtype=dtype, cpu=cpu)
    if as_json:
        typer.echo(json.dumps(kernel_rows(made), indent=2))
    else:
        show(kernel_table(made))


@app.command()
def calibrate() -> None:
    """Measure this machine, for a minute or two, so that predictions for it are about it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from attnopt.plan.calibrate.calibrate import calibrate as measure

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar, redirect_stdout(sys.stderr):
        task = bar.add_task("", total=1.0)
        target, path = measure(said=lambda what, done: bar.update(task, description=what, completed=done))
    typer.echo(
        f"{target.description}: {target.peak['float32'] * 1e3:.0f} GFLOP/s of float32, {target.bandwidth / 1e9:.0f} GB/s of memory"
    )
    typer.echo(f"written to {path}")


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the machines that attnopt knows."""
    from dataclasses import asdict

    from attnopt.cost.target import all_targets
    from attnopt.report.table import target_table

    known = all_targets()
    if as_json:
        typer.echo(json.dumps([asdict(t) for t in known], indent=2))
    else:
        show(target_table(known))


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the rewrites: what each does, and whether it is exact."""
    from attnopt.passes import ALL
    from attnopt.report.table import pass_table

    rows = [(p.name, p.exact, (type(p).__doc__ or "").strip().splitlines()[0]) for p in ALL]
    if as_json:
        typer.echo(json.dumps([{"name": n, "exact": exact, "what": what} for n, exact, what in rows], indent=2))
    else:
        show(pass_table(rows))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"attnopt {__version__}")
        raise typer.Exit


def names_of(passes: list[str] | None) -> list[str] | None:
    return [name.strip() for given in passes for name in given.split(",")] if passes else None


def budget_of(limit: float, metric: str, drop: float | None) -> Any:
    """A bare number as it is, so that 0 and mistakes mean what they do in Python."""
    from attnopt.plan.judge.budget import QUALITY, Budget

    if metric == QUALITY or drop is not None:
        return Budget(QUALITY, drop=drop)
    return limit if metric == "natural" else Budget(metric, limit=limit)


def require_writable(output: Path, model: Path) -> None:
    """Refuse a place that cannot be written before the work, not after it."""
    if output.suffix == ".pt2" and model.suffix == ".onnx":
        raise UnsupportedFormat("an ONNX model cannot be written as .pt2", next_move="Name the output .onnx.")
    require_place(output, (".onnx", ".pt2"), ".onnx or .pt2")


def require_place(output: Path, suffixes: tuple[str, ...], wanted: str) -> None:
    if output.suffix not in suffixes:
        raise UnsupportedFormat(f"cannot write '{output.suffix or output.name}'", next_move=f"Name the output {wanted}.")
    folder = output.parent
    if not folder.is_dir():
        raise OutputNotWritable(f"there is no folder '{folder}'", next_move="Make it, or choose another place.")
    if output.is_dir():
        raise OutputNotWritable(f"'{output}' is a folder", next_move="Give the name of a file.")
    try:
        with tempfile.TemporaryFile(dir=folder):  # the only true answer: permission bits say nothing to root
            pass
    except OSError as failure:
        raise OutputNotWritable(
            f"the folder '{folder}' cannot be written: {failure.strerror}", next_move="Choose another place."
        ) from None


def main() -> None:
    """The console script."""
    try:
        app(prog_name="attnopt")  # also where it runs as a module
    except AttnoptError as failure:
        line = " ".join(part.strip() for part in str(failure).splitlines())
        typer.echo(f"{type(failure).__name__}: {line}", err=True)
        raise SystemExit(failure.exit_code) from None
