"""attnopt's Triton kernels on a GPU, beside torch's SDPA backends and FlexAttention: are they right, and how fast are they?

One command, less than eight minutes on one H100 or H200. Every family is checked against the reference in float64 on fresh random data
when its first row is reached; then all contenders of a row run in turn, in this process. Important rows come first, and rows that
the deadline leaves out are listed. Without a GPU it says so and ends well.

    python benchmarks/gpu_attention.py [--seconds 430] [--out FOLDER]
    TRITON_INTERPRET=1 python benchmarks/gpu_attention.py --small --out FOLDER     every code path on tiny shapes, without a GPU
    python benchmarks/gpu_attention.py --empty                                     the table as it stands before any measurement
    python benchmarks/gpu_attention.py --tiles                                     every tile of every table: corrects their ranking

Results go to benchmarks/results/gpu_attention.json and .md, and to FOLDER (or $OUT) too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # attnopt need not be installed

import harness
import torch
from gpu.ahead import compile_ahead
from gpu.ceilings import Ceilings, ceilings
from gpu.device import described, unusable
from gpu.goals import goal_lines
from gpu.measure import NOT_MEASURED, Row, measured
from gpu.order import rows, small
from gpu.ours import OURS
from gpu.table import COMMAND, as_text, cells, markdown
from gpu.tiles import all_tiles, as_toml

from attnopt.codegen.triton import ranking
from attnopt.codegen.triton.triton_attention import architecture

NAME = "gpu_attention"


def notes(about: dict[str, Any], top: Ceilings) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"{about['name']}, driver {about['driver'] or 'unknown'}, {versions}",
        f"measured ceilings: bf16 product of 8192 x 8192 {top.product / 1e12:.0f} TFLOP/s, copy {top.copy / 1e9:.0f} GB/s",
        f"`{COMMAND}` makes this table; medians, contenders in turn, the last-level cache emptied before each call",
    ]


def write(folder: Path, found: list[Row], about: dict[str, Any], top: Ceilings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"device": about, "ceilings": asdict(top), "goals": goal_lines(found, top), "rows": [asdict(r) for r in found]}
    (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(markdown(found, top, notes(about, top)), encoding="utf-8")


def empty() -> str:
    """The table with nothing measured."""
    told = [
        f"no GPU has run this yet: every figure is open; `{COMMAND}` fills the table in less than eight minutes on one H100 or H200"
    ]
    return markdown([Row(case, state=NOT_MEASURED) for case in rows()], None, told)


def rank_tiles(name: str, device: torch.device, folders: list[Path]) -> None:
    """Time the tiles of this architecture; measurements of others stay as they are."""
    place = Path(ranking.__file__).with_name(ranking.MEASURED)
    found = {table: dict(factors) for table, factors in ranking.corrections().items()}
    for table, factors in all_tiles(name, device):
        print(table, *(f"  {factor:5.2f}  {tile}" for tile, factor in factors.items()), sep="\n", flush=True)
        found[table] = factors
        for file in (place, *(folder / ranking.MEASURED for folder in folders)):  # after each table: what was measured is kept
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(as_toml(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=430.0, help="after which no further row is begun")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="one more folder for the results")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU where there is no GPU; nothing is kept")
    parser.add_argument("--seed", type=int, help="of the data, which are fresh in each run without it")
    parser.add_argument("--empty", action="store_true", help="write the table with nothing measured")
    parser.add_argument("--tiles", action="store_true", help="time tiles instead, and write what corrects their ranking")
    asked = parser.parse_args()
    if asked.empty:
        (harness.RESULTS / f"{NAME}.md").write_text(empty(), encoding="utf-8")
        return
    if not asked.small and (reason := unusable()) is not None:
        print(f"nothing is measured: {reason}")
        return
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.tiles:
        rank_tiles(architecture(device), device, [Path(asked.out)] if asked.out else [])
        return
    cases = small(rows()) if asked.small else rows()
    if device.type == "cuda" and (late := compile_ahead(cases, architecture(device))):
        print(late)
    about, top = described(device), ceilings(device)
    print(*notes(about, top), sep="\n", flush=True)
    folders = [Path(asked.out)] if asked.out else []
    folders += [] if asked.small else [harness.RESULTS]
    found: list[Row] = []
    for row in measured(cases, device, started + asked.seconds, asked.seed):
        found.append(row)
        if not row.state or row.seconds:
            print(f"{time.monotonic() - started:4.0f} s  " + "  ".join(c for c in cells(row, found, top) if c), flush=True)
            for folder in folders:  # after each row: whatever ends this process, what was measured is kept
                write(folder, found, about, top)
    for folder in folders:
        write(folder, found, about, top)
    print("", as_text(found, top), "", *("  ".join(line) for line in goal_lines(found, top)), sep="\n")
    if any(row.wrong for row in found):
        raise SystemExit("a kernel computes something else than the reference: see WRONG")
    if failed := [row.case.name for row in found if OURS in row.reasons or row.state.startswith("failed")]:
        raise SystemExit(f"{len(failed)} rows in which attnopt's kernel did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
