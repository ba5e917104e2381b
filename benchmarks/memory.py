"""The most memory that an optimisation holds on long texts, with and without its bound.

    the recall model, 32 texts of 8,192 tokens in batches of 2      ->   peak with no limit | with 2 GiB | with half of the machine

Each runs in a process of its own, whose largest resident set the system tells. All passes, effort low cut to SECONDS, one thread: what is
measured are bytes, not seconds. The weights are small; what takes memory are activations, what is kept of outputs, and evidence.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--length 8192] [--limits none 2 half]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import harness

NONE, HALF = "none", "half"
GIB = 2**30
SAMPLES, BATCH = 32, 2
SECONDS = 10.0  # of measuring
TOLD = "measured: "


@dataclass(frozen=True)
class Peak:
    """In bytes; limit 0 where there was none. before: what the process held when it had the model and the texts."""

    limit: int
    before: int
    peak: int
    seconds: float
    steps: int
    measurements: int
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.limit or self.peak <= self.limit


def optimised(limit: str, length: int) -> Peak:
    """In this process, which does nothing else."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import torch
    from trained_models import recall_model

    import attnopt
    from attnopt.plan.memory import resident
    from attnopt.plan.search import effort

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    share = {NONE: 1e6, HALF: effort.EFFORTS["low"].memory}.get(limit) or float(limit) * GIB / resident.machine()
    effort.EFFORTS["low"] = replace(effort.EFFORTS["low"], memory=share, seconds=SECONDS)  # a user has the default alone
    random = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(0, 80, (BATCH, length), generator=random)} for _ in range(SAMPLES // BATCH)]
    model = recall_model()
    before = resident.held()
    made = attnopt.optimize(model, texts[0], calibration=texts, budget=0.01, effort="low")
    found = made.report.search
    assert found is not None
    steps = len(made.plan.steps)
    held = 0 if limit == NONE else int(share * resident.machine())
    return Peak(held, before, resident.peak(), found.seconds, steps, found.measurements, made.report.notes)


def apart(limit: str, length: int) -> Peak:
    command = [sys.executable, __file__, "--alone", limit, "--length", str(length)]
    folders = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": folders})
    line = next((x for x in ended.stdout.splitlines() if x.startswith(TOLD)), None)
    if line is None:
        sys.exit(f"with limit {limit}: {ended.stderr[-2000:]}")
    record = json.loads(line.removeprefix(TOLD))
    return Peak(**{**record, "notes": tuple(record["notes"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--limits", nargs="+", default=[NONE, "2", HALF], help="GiB, none, or half of the machine's")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(TOLD + json.dumps(asdict(optimised(given.alone, given.length))))
        return
    found = {limit: apart(limit, given.length) for limit in given.limits}
    cells = [
        [
            "no limit" if not p.limit else f"{p.limit / GIB:.2f} GiB" + (", the default" if limit == HALF else ""),
            f"{p.before / GIB:.2f} GiB",
            f"{p.peak / GIB:.2f} GiB",
            "" if not p.limit else "yes" if p.holds else "NO",
            str(p.measurements),
            f"{p.seconds:.0f} s",
        ]
        for limit, p in found.items()
    ]
    table = harness.markdown(["limit", "before", "peak", "holds", "measurements", "search"], cells)
    head = (
        f"The recall model on {SAMPLES} texts of {given.length} tokens in batches of {BATCH}, budget 0.01, all passes, one thread"
    )
    lines = "\n".join(f"- {limit}: {note}" for limit, p in found.items() for note in p.notes)
    text = f"{head}:\n\n{table}\n{lines}\n"
    print(text)
    path = harness.save("memory", list(found.values()), [head])
    path.with_suffix(".md").write_text(text)
    if not all(p.holds for p in found.values()):
        sys.exit("the bound does not hold")


if __name__ == "__main__":
    main()
