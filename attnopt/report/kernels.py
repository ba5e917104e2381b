"""Kernels that were written out, as a table and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from attnopt.ir.site import Refusal
from attnopt.report.table import table

if TYPE_CHECKING:
    from attnopt.codegen.site_kernels import SiteKernel


def kernel_rows(made: Sequence[SiteKernel]) -> list[dict[str, Any]]:
    """One entry for each kernel: its figures, or the reason why there is none."""
    rows: list[dict[str, Any]] = []
    for kernel in made:
        row: dict[str, Any] = {"name": kernel.name, "spec": str(kernel.spec), "sites": list(kernel.sites)}
        if isinstance(kernel.result, Refusal):
            row["refused"] = kernel.result.reason
        else:
            tile = kernel.result.tile
            row["tile"] = [tile.block_q, tile.block_k, tile.num_warps, tile.num_stages]
            row |= {"registers": kernel.result.registers, "shared_memory_bytes": kernel.result.shared_memory}
        rows.append(row)
    return rows


def kernel_table(made: Sequence[SiteKernel]) -> Any:
    if not made:
        return Text("no attention found")
    body = table("kernel", "sites", "spec", "queries x keys, warps, stages", "registers", "shared KiB")
    for row in kernel_rows(made):
        if "refused" in row:
            cells = [f"none: {row['refused']}", "", ""]
        else:
            q, k, warps, stages = row["tile"]
            cells = [f"{q} x {k}, {warps}, {stages}", str(row["registers"]), f"{row['shared_memory_bytes'] / 1024:.0f}"]
        body.add_row(*map(Text, (row["name"], str(len(row["sites"])), row["spec"], *cells)))
    return body
