"""Queries and keys in int8 on this CPU: TVM's prefill kernel with `precision(q=int8, k=int8, …)` beside the same in float32, in turn.

Scales of each row, and of the threads of a tensor core as SageAttention2 shares them; keys less their mean, values as they are. Lengths
of 1,024 to 4,096, 64 and 128 channels, full and causal. The difference is that of the outputs, relative to those of float32.

    OMP_NUM_THREADS=1 python benchmarks/cpu_rounded.py [--cpu alderlake] [--threads 1] [--quick] [--anyway]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from torch import Tensor

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.compile import compile_source, loaded
from attnopt.codegen.tvm.cpu import Cpu, host, named
from attnopt.codegen.tvm.low_precision import tiles_for
from attnopt.codegen.tvm.prefill import emit, supports
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.cost.machine import clock
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.passes.quantize.sage_attention import precision
from attnopt.plan.timing.timing import in_turn

PRECISIONS = {
    "float32": "",
    "int8 by row": "precision(q=int8, k=int8, k_smooth=0)",
    "int8 by thread": str(precision("int8", "fp32")),
}
LENGTHS = {1024: 4, 2048: 2, 4096: 1}  # heads of each
Kernel = Callable[..., None]


@dataclass(frozen=True)
class Row:
    """Median seconds of each precision, and how far its output is from that of float32."""

    setting: str
    seconds: dict[str, float]
    difference: dict[str, float]


def kernel(line: str, width: int, cpu: Cpu) -> Kernel:
    spec, form = parse(line), Form(width, width, "float32")
    if (refused := supports(spec, form, cpu)) is not None:
        sys.exit(f"{line}: {refused}")
    made = compile_source(emit(spec, form, tiles_for(spec, cpu, form)[0], cpu), cpu)
    if isinstance(made, Refusal):
        sys.exit(str(made))
    return loaded(made)


def measured(setting: str, kernels: dict[str, Kernel], q: Tensor, k: Tensor, v: Tensor, seconds: float) -> Row:
    follow_torch()
    outputs = {name: torch.full_like(q, torch.nan) for name in kernels}
    calls = {name: (lambda run=run, o=outputs[name]: run(q, k, v, o)) for name, run in kernels.items()}
    times = in_turn(calls, seconds=seconds, clock=clock())
    plain = outputs["float32"]
    difference = {name: float((o - plain).norm() / plain.norm()) for name, o in outputs.items()}
    return Row(setting, {name: t.median for name, t in times.items()}, difference)


def cells(row: Row) -> list[str]:
    plain = row.seconds["float32"]
    gained = [f"{s * 1e3:.3g} ({plain / s:.2f}x, {row.difference[n]:.1e})" for n, s in row.seconds.items() if n != "float32"]
    return [row.setting, f"{plain * 1e3:.3g}", *gained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", help="a CPU whose instructions this one has too; default: this one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="every code path on small shapes, in no useful time; nothing is written"
    )
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cpu = host() if given.cpu is None else named(given.cpu)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    torch.manual_seed(0)
    rows = []
    for width in (64, 128):
        for mask in ("", "causal"):
            line = f"softmax scale({width**-0.5:.7g}) {mask}"
            kernels = {name: kernel(f"{line} {said}", width, cpu) for name, said in PRECISIONS.items()}
            for length, heads in {100: 1}.items() if given.quick else LENGTHS.items():
                q, k, v = (torch.randn(1, heads, length, width) for _ in range(3))
                k = k + 2 * torch.randn(1, heads, 1, width)  # keys share a large part, as those of models do
                rows.append(
                    measured(f"{mask or 'full'} {length} d{width} x {heads}", kernels, q, k, v, 0.02 if given.quick else 1.0)
                )
    table = harness.markdown(["setting", *(f"{name}, ms" for name in PRECISIONS)], [cells(row) for row in rows])
    notes = [
        f"{harness.machine()['processor']}, {given.threads} threads, compiled for {cpu.name}; other processes used {busy:.2f} cores",
        "medians of calls in turn; in brackets how many times as fast as float32, and the relative difference of the output",
    ]
    print(table, *notes, sep="\n")
    if not given.quick:
        path = harness.save("cpu_rounded", rows, notes, {"threads": given.threads, "cpu": cpu.name})
        path.with_suffix(".md").write_text(table + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
