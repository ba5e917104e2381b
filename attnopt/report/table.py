"""Reports as tables for a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from attnopt.ir.site import Refusal

if TYPE_CHECKING:
    from attnopt.report.data import Report
    from attnopt.report.inspection import Inspection


NUMBER = re.compile(r"(?<=[._:])\d+")


def as_text(renderable: Any, width: int = 140) -> str:
    """What the table looks like on a plain terminal, without colours."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(renderable)
    return buffer.getvalue().rstrip()


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(Text(column), overflow="fold")  # as text: brackets are no markup
    return made


def inspection_table(inspection: Inspection) -> Any:
    if not inspection.sites:
        return Group(Text("no attention found"), refusal_summary(inspection.refusals))
    body = table("site", "spec", "[b, heads, q x k, d]", "GFLOP", "MB")
    rows = [(s.name, (s.spec, s.shape, number(s.flops, 1e9), number(s.bytes, 1e6))) for s in inspection.sites]
    for name, cells in grouped(rows):
        body.add_row(Text(name), *map(Text, cells))
    head = Text(f"{len(inspection.sites)} attention{'s' * (len(inspection.sites) != 1)} found")
    return Group(head, body, refusal_summary(inspection.refusals))


def grouped(rows: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Rows that are alike but for the number of the layer as one: layer.0.attention, layer.1.attention -> layer.{0,1}.attention."""
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    names: dict[tuple[str, tuple[str, ...]], str] = {}
    for name, cells in rows:
        first = NUMBER.search(name)
        key = (NUMBER.sub("#", name, count=1), cells)
        merged.setdefault(key, []).append(first.group() if first else "")
        names[key] = name
    result = []
    for key, numbers in merged.items():
        name = names[key] if len(numbers) == 1 else key[0].replace("#", "{" + ranges(numbers) + "}", 1)
        result.append((name, key[1]))
    return result


def ranges(numbers: Sequence[str]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    spans: list[list[int]] = []
    for n in sorted({int(n) for n in numbers}):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def refusal_summary(refusals: Sequence[Refusal]) -> Text:
    if not refusals:
        return Text("")
    return Text(f"{len(refusals)} near miss{'es' * (len(refusals) != 1)}; `attnopt inspect --explain` says why")


def explanation(inspection: Inspection) -> Any:
    """The distinct blocks, one line each, and the near misses."""
    if not inspection.sites:
        return refusal_table(inspection.refusals)
    body = table("site", "block: norm -> projections [in x out]; on the way to q and k; output; residual")
    for name, cells in grouped([(s.name, (str(s.block),)) for s in inspection.sites]):
        body.add_row(Text(name), *map(Text, cells))
    return Group(body, Text(""), refusal_table(inspection.refusals))


def refusal_table(refusals: Sequence[Refusal]) -> Any:
    if not refusals:
        return Text("no near misses")
    body = table("node", "reached", "why it is not taken for attention", "what would match", "module", "line")
    for refusal in refusals:
        where = (refusal.source.module, refusal.source.line)
        body.add_row(*map(Text, (refusal.node, refusal.reached, refusal.reason, refusal.remedy, *where)))
    return body


def report_table(report: Report) -> Any:
    parts: list[Any] = []
    if report.sites:
        body = table("site", "spec", "kernel", "before", "after", "why")
        rows = [
            (x.name, (x.after, x.kernel, milliseconds(x.seconds_before), milliseconds(x.seconds_after), x.why))
            for x in report.sites
        ]
        for name, cells in grouped(rows):
            body.add_row(Text(name), *map(Text, cells))
        parts.append(body)
    for rewrite in report.rewrites:
        parts.append(Text(f"{rewrite.name}: {'kept' if rewrite.kept else 'not kept'}, {rewrite.description}: {rewrite.why}"))
    parts.append(Text(summary(report)))
    parts += [Text(note) for note in report.notes]
    return Group(*parts)


def summary(report: Report) -> str:
    """The last line: counts, whole-model time, difference."""
    found = len(report.sites)
    text = (
        [f"{found} attention{'s' * (found != 1)} found, {report.fused} replaced"]
        if found
        else ["no attention found, nothing replaced"]
    )
    if report.seconds_before is not None and report.seconds_after is not None:
        ratio = report.seconds_before / report.seconds_after
        text.append(f"model {milliseconds(report.seconds_before)} -> {milliseconds(report.seconds_after)} ({ratio:.2f}x)")
    if report.bytes_before is not None and report.bytes_after is not None:
        text.append(f"weights and cache {megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)}")
    if report.difference is not None:
        allowed = f" (allowed {report.difference.tolerance:.1g})" if report.difference.exact else ""
        text.append(
            f"largest difference {report.difference.max_abs:.2g} absolute, {report.difference.max_rel:.2g} relative{allowed}"
        )
    return "; ".join(text)


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g} ms"


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g} MB"


def number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def target_table(targets: Sequence[Any]) -> Any:
    body = table("target", "machine", "units", "memory", "bandwidth", "bf16", "arch", "measured")
    for t in targets:
        memory = f"{t.memory / 2**30:.0f} GiB" if t.memory else ""
        bandwidth = f"{t.bandwidth / 1e12:.2f} TB/s" if t.bandwidth else ""
        peak = f"{t.peak['bfloat16']:.3g} TFLOP/s" if "bfloat16" in t.peak else ""
        when = t.measured or ("no: attnopt calibrate" if t.kind == "cpu" else "")
        body.add_row(t.name, Text(t.description), str(t.units), memory, bandwidth, peak, t.arch, when)
    return body


def pass_table(rows: Sequence[tuple[str, bool, str]]) -> Any:
    body = table("pass", "exact", "what it does")
    for name, exact, what in rows:
        body.add_row(name, "yes" if exact else "no", Text(what))
    return body
