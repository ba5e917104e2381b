"""The zoo's results as text: totals, one row for each type, what was missed and why, and what could not be exported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import harness

from zoo.measure import Record
from zoo.small_configs import SMALL
from zoo.subject import TYPES

TOLERANCE = 1e-4  # largest difference of an exact rewrite in float32


def faults(record: Record) -> list[str]:
    """What a record must not show: attention that is missed, found where none is, or changed by an exact rewrite."""
    found = []
    if record.covered < record.truth:
        found.append(f"{record.truth - record.covered} of {record.truth} attentions missed")
    if record.false:
        found.append(f"{record.false} sites that are no attention")
    if record.rewrite_error:
        found.append(f"the rewrite fails: {record.rewrite_error}")
    elif record.difference is not None and not record.difference <= TOLERANCE:
        found.append(f"the rewrite changes outputs by {record.difference:.1e}")
    return found


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


def totals(records: Sequence[Record]) -> list[str]:
    """One line for each attention implementation, and for what is not in it."""
    lines = []
    for attention in dict.fromkeys(r.attention for r in records):
        asked = [r for r in records if r.attention == attention and r.applies]
        known = [r for r in asked if not r.error]
        holding = [r for r in known if r.truth]
        whole = [r for r in holding if r.covered == r.truth]
        truth, covered = sum(r.truth for r in known), sum(r.covered for r in known)
        lifted, tensors = sum(r.lifted for r in known), sum(r.tensors for r in known)
        worst = max((r.difference for r in known if r.difference is not None), default=0.0)
        lines.append(
            f"{attention}: {len(asked)} types, {len(known)} exported, {len(holding)} with attention, {share(len(whole), len(holding))} of"
            f" them wholly recognised; {share(covered, truth)} attentions, {sum(r.false for r in known)} false;"
            f" {share(lifted, lifted + tensors)} mask and bias terms are expressions; largest difference after the exact rewrite"
            f" {worst:.1e}; {sum(bool(r.rewrite_error) for r in known)} types fail to be rewritten"
        )
    return lines


def row(record: Record) -> list[str]:
    specs = "; ".join(f"{count} x `{line}`".replace("|", "\\|") for line, count in record.specs.items())
    difference = record.rewrite_error or ("" if record.difference is None else f"{record.difference:.0e}")
    return [
        record.model_type, record.attention, str(record.truth), str(record.covered), str(record.false),
        f"{record.lifted}/{record.lifted + record.tensors}", difference, f"{record.export_seconds:.1f}", f"{record.recognise_seconds:.2f}",
        record.dynamic, specs,
    ]  # fmt: skip


COLUMNS = (
    "type", "attention", "truth", "covered", "false", "lifted", "difference", "export s", "recognise s", "dynamic", "specs",
)  # fmt: skip


def unmeasured(records: Sequence[Record]) -> list[str]:
    """What a run that was stopped has left out."""
    lines = []
    for attention in dict.fromkeys(r.attention for r in records):
        left = sorted(set(TYPES) - {r.model_type for r in records if r.attention == attention})
        if left:
            lines.append(
                f"{attention}: the run was stopped; {len(left)} of {len(TYPES)} types are not measured, {left[0]} to {left[-1]};"
                " `python benchmarks/zoo.py --resume` measures them"
            )
    return lines


def in_part(records: Sequence[Record]) -> list[str]:
    """What cannot be traced as it is."""
    found = sorted(
        {r.model_type for r in records if not r.error and r.model_type in SMALL and SMALL[r.model_type].part is not None}
    )
    if not found:
        return []
    return [
        f"{len(found)} types cannot be traced as they are, and are measured in part, with other spelling of their experts, or with what"
        f" Python reads from tensors as on the example (benchmarks/zoo/parts.py): {', '.join(found)}"
    ]


def markdown(records: Sequence[Record]) -> str:
    ordered = sorted(records, key=lambda r: (r.attention, r.model_type))
    exported, failed = [r for r in ordered if not r.error], [r for r in ordered if r.error and r.applies]
    parts = [
        "# Every model type of transformers\n",
        "\n".join(f"- {line}" for line in (*totals(ordered), *in_part(ordered), *unmeasured(ordered))) + "\n",
        harness.markdown(COLUMNS, [row(r) for r in exported]),
    ]
    if missing := why(exported):
        parts += ["## Missed\n", "\n".join(f"- {line}" for line in missing) + "\n"]
    if absent := [r.model_type for r in ordered if not r.applies]:
        parts += [f"## Without scaled_dot_product_attention\n\n{', '.join(absent)}\n"]
    if failed:
        parts += ["## Not exported\n", "\n".join(f"- {r.model_type} ({r.attention}): {r.error}" for r in failed) + "\n"]
    return "\n".join(parts)


def why(records: Iterable[Record]) -> list[str]:
    """Each missed attention with its refusal, and each site that is none."""
    lines = []
    for record in records:
        for m in record.missed:
            lines.append(
                f"{record.model_type} ({record.attention}) {m['softmax']}: {m['reason']}, at {m['node']} {m['line']} {m['module']}"
            )
        for w in record.wrong:
            lines.append(f"{record.model_type} ({record.attention}) {w['site']} is no attention: {w['spec']} {w['line']}")
    return lines


def as_text(record: Record) -> str:
    """What is printed as a type is done."""
    head = f"{record.model_type} ({record.attention})"
    if record.error:
        return f"{head}: not exported: {record.error}"
    difference = "" if record.difference is None else f", outputs differ by {record.difference:.1e}"
    lines = [
        f"{head}: truth {record.truth}, covered {record.covered}, false {record.false}, lifted {record.lifted} of"
        f" {record.lifted + record.tensors}{difference}, {record.export_seconds:.1f} s to export, {record.recognise_seconds:.2f} s to"
        f" recognise {record.nodes} nodes"
    ]
    lines += [f"  {count} x {line}" for line, count in record.specs.items()]
    return "\n".join(lines + [f"  ! {fault}" for fault in faults(record)])
