"""The command line: inspect, optimize, kernels, calibrate, targets, passes.

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
    target: Annotated[str, typer.Option(help="A name of `attnopt targets`, with a runtime if wanted: cpu+onnxruntime.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Largest allowed loss; 0 allows exact rewrites only.")] = 0.0,
    calibration: Annotated[
        Path | None, typer.Option(help="An .npz with one array per input: what the loss is measured on.")
    ] = None,
    select: Annotated[str | None, typer.Option(help="measure, model or always: how kernels are chosen.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option(help="Names of passes to restrict to, separated by commas or repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a faster model, and say what was done, why, and what it cost."""
    from attnopt.api import optimize as optimize_model

    require_writable(output, model)
    names = [name.strip() for given in passes for name in given.split(",")] if passes else None
    with redirect_stdout(sys.stderr):
        result = optimize_model(model, target=target, budget=budget, calibration=calibration, select=select, passes=names)
        result.export(output)
    if as_json:
        typer.echo(json.dumps(result.report.to_json(), indent=2))
        return
    show(result.report)
    typer.echo(f"written to {output}")


@app.command()
def kernels(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    target: Annotated[str, typer.Option(help="A name of `attnopt targets` with a GPU.")],
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; as in the model where it is left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a Triton kernel for each distinct attention of a model: source, assembly, binary, resources."""
    from attnopt.api import kernels as write_kernels
    from attnopt.report.kernels import kernel_rows, kernel_table

    with redirect_stdout(sys.stderr):
        made = write_kernels(model, output, target=target, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(kernel_rows(made), indent=2))
    else:
        show(kernel_table(made))


@app.command()
def calibrate() -> None:
    """Measure this machine, for about a minute, so that predictions for it are about it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from attnopt.plan.calibrate import calibrate as measure

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


def require_writable(output: Path, model: Path) -> None:
    """Refuse a place that cannot be written before the work, not after it."""
    if output.suffix not in (".onnx", ".pt2"):
        raise UnsupportedFormat(f"cannot write '{output.suffix or output.name}'", next_move="Name the output .onnx or .pt2.")
    if output.suffix == ".pt2" and model.suffix == ".onnx":
        raise UnsupportedFormat("an ONNX model cannot be written as .pt2", next_move="Name the output .onnx.")
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
