"""The HTML page of a frontier: inline SVG and a table, no script, no other file.

time, ms                         weights + cache, MB
 |o                               |o
 |  o___                          |  o__o
 |       o____o                   |       o
 +-------------- loss             +-------------- loss       (loss on a logarithmic axis, the exact plan at its left end)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from attnopt.report.frontier import Frontier, Point
from attnopt.report.table import megabytes

WIDTH, HEIGHT, MARGIN = 520, 340, 56
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1120px; padding: 0 1rem; color: #1c1e21; background: #fff }
h1 { font-size: 1.3rem } figure { display: inline-block; margin: 0 1rem 1rem 0 } figcaption { font-weight: 600 }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right } tr.beaten td { color: #888 } .note { color: #555 }
svg text { font: 12px system-ui, sans-serif; fill: #333 } svg .axis { stroke: #999 } svg .grid { stroke: #eee }
svg .line { fill: none; stroke: #2563eb; stroke-width: 2 } svg .best { fill: #2563eb } svg .beaten { fill: #bbb }
"""


def page(frontier: Frontier) -> str:
    """The whole document."""
    title = f"{frontier.model} on {frontier.target}"
    rows = "\n".join(row(p, frontier.points[0]) for p in frontier.points)
    notes = "".join(f'<p class="note">{escape(n)}</p>' for n in (frontier.search, *frontier.notes) if n)
    numbers = "".join(
        f'<th class="n">{escape(n)}</th>' for n in (frontier.metric, "at most (95 %)", "time", "speed", "weights + cache")
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
{picture(frontier, "time, ms", lambda p: p.seconds * 1e3)}
{picture(frontier, "weights + cache, MB", lambda p: p.memory / 1e6)}
<table>
<tr><th>plan</th>{numbers}<th>rewrites</th></tr>
{rows}
</table>
{notes}
</body>
</html>
"""


def row(point: Point, first: Point) -> str:
    bound = "" if point.bound is None else f"{point.bound:.3g}"
    time = f"{point.seconds * 1e3:.3g} ms" + " (predicted)" * (not point.timed)
    numbers = (f"{point.loss:.3g}", bound, time, f"{first.seconds / point.seconds:.2f}x", megabytes(point.memory))
    cells = "".join(f'<td class="n">{n}</td>' for n in numbers)
    kind = "" if point.best else ' class="beaten"'
    return f"<tr{kind}><td>{escape(point.name)}</td>{cells}<td>{escape(point.rewrites)}</td></tr>"


def picture(frontier: Frontier, label: str, value: Callable[[Point], float]) -> str:
    """One scatter of a cost against the loss, with the steps of the best points."""
    points = frontier.points
    place = horizontal([p.loss for p in points])
    low, high = 0.0, max(value(p) for p in points) * 1.08 or 1.0

    def up(cost: float) -> float:
        return HEIGHT - MARGIN - (cost - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [grid(low, high, up), *decades([p.loss for p in points], place)]
    best = lower_steps(points, value)
    path = " ".join(
        f"{'M' if i == 0 else 'H'}{place(p.loss):.1f}" + (f" {up(value(p)):.1f}" if i == 0 else f" V{up(value(p)):.1f}")
        for i, p in enumerate(best)
    )
    parts.append(f'<path class="line" d="{path} H{WIDTH - MARGIN}"/>')
    for p in points:
        said = escape(f"{p.name}: {frontier.metric} {p.loss:.3g}, {p.seconds * 1e3:.3g} ms, {megabytes(p.memory)}")
        kind = "best" if p in best else "beaten"
        parts.append(
            f'<circle class="{kind}" cx="{place(p.loss):.1f}" cy="{up(value(p)):.1f}" r="5"><title>{said}</title></circle>'
        )
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">{escape(frontier.metric)}</text>')
    axes = f'<path class="axis" fill="none" d="M{MARGIN} {MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}"/>'
    body = "\n".join([*parts, axes])
    head = f'<svg role="img" aria-label="{escape(label)} against loss" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return f"<figure><figcaption>{escape(label)}</figcaption>\n{head}\n{body}\n</svg></figure>"


def lower_steps(points: Sequence[Point], value: Callable[[Point], float]) -> list[Point]:
    """The points that cost less than all which lose no more, by loss."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.loss, value(p))):
        if not best or value(p) < value(best[-1]):
            best.append(p)
    return best


def horizontal(losses: Sequence[float]) -> Callable[[float], float]:
    """Where a loss stands: logarithmic, everything below the least that is not zero at the left end."""
    low, high = decade_range(losses)

    def place(loss: float) -> float:
        at = low if loss <= 0 else min(max(math.log10(loss), low), high)
        return MARGIN + (at - low) / (high - low) * (WIDTH - 2 * MARGIN)

    return place


def decade_range(losses: Sequence[float]) -> tuple[float, float]:
    known = [math.log10(x) for x in losses if 0 < x < math.inf]
    low, high = (math.floor(min(known)), math.ceil(max(known))) if known else (-3, 0)
    return low - 0.5, max(high, low + 1)  # exact plans stand half a decade below


def decades(losses: Sequence[float], place: Callable[[float], float]) -> list[str]:
    low, high = decade_range(losses)
    powers = range(math.ceil(low), math.floor(high) + 1)
    marks = [f'<text x="{MARGIN:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">0</text>']
    for power in powers:
        x = place(10.0**power)
        marks.append(f'<path class="grid" d="M{x:.1f} {MARGIN} V{HEIGHT - MARGIN}"/>')
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{10.0**power:g}</text>')
    return marks


def grid(low: float, high: float, up: Callable[[float], float]) -> str:
    """Lines at round numbers."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    marks, at = [], 0.0
    while at <= high:
        y = up(at)
        marks.append(f'<path class="grid" d="M{MARGIN} {y:.1f} H{WIDTH - MARGIN}"/>')
        marks.append(f'<text x="{MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{at:g}</text>')
        at = round(at + step, 10)
    return "".join(marks)
