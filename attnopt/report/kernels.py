"""Kernels that were written out, as a table and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from attnopt.ir.site import Refusal
from attnopt.report.table import table

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel

ON_GPU = ("queries x keys, warps, stages", "registers", "shared KiB")
ON_CPU = ("compiled for", "tile", "library, KiB")


def kernel_rows(made: Sequence[SiteKernel]) -> list[dict[str, Any]]:
    """One entry for each kernel: its figures, or the reason why there is none."""
    rows: list[dict[str, Any]] = []
    for kernel in made:
        row: dict[str, Any] = {"name": kernel.name, "spec": str(kernel.spec), "sites": list(kernel.sites)}
        rows.append(row | ({"refused": kernel.result.reason} if isinstance(kernel.result, Refusal) else kernel.result.figures))
    return rows


def kernel_table(made: Sequence[SiteKernel]) -> Any:
    if not made:
        return Text("no attention found")
    rows = kernel_rows(made)
    body = table("kernel", "sites", "spec", *(ON_CPU if any("cpu" in row for row in rows) else ON_GPU))
    for row in rows:
        body.add_row(*map(Text, (row["name"], str(len(row["sites"])), row["spec"], *cells(row))))
    return body


def cells(row: dict[str, Any]) -> list[str]:
    """The figures of a kernel under the columns of its machine."""
    if "refused" in row:
        return [f"none: {row['refused']}", "", ""]
    if "cpu" in row:
        sizes = ", ".join(f"{name} {size}" for name, size in row["tile"].items())
        return [row["cpu"], sizes, f"{row['library']}, {row['library_bytes'] / 1024:.0f}"]
    q, k, warps, stages = row["tile"]
    return [f"{q} x {k}, {warps}, {stages}", str(row["registers"]), f"{row['shared_memory_bytes'] / 1024:.0f}"]
