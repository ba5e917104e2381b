"""What onnxruntime spends on scores that a causal mask hides, with and without `session.set_denormal_as_zero`.

    OMP_NUM_THREADS=1 python benchmarks/hidden_scores.py [--anyway]

The option counts in the first session of a process alone, so each side has processes of its own, which take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np

SHAPES = ((12, 128, 64), (12, 512, 64), (8, 1024, 64), (8, 2048, 128))  # heads, tokens, width
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """Median seconds of one shape: without a mask, causal, and causal with the option."""

    heads: int
    tokens: int
    width: int
    whole: float
    causal: float
    causal_zeros: float


def model(heads: int, tokens: int, width: int, *, causal: bool) -> bytes:
    """One Attention of opset 23."""
    from onnx import TensorProto, helper

    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, heads, tokens, width]) for name in "qkv"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    graph = helper.make_graph([node], "attention", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return made.SerializeToString()  # type: ignore[no-any-return]


def timed(zeros: str) -> list[list[float]]:
    """Median seconds of each shape, [without a mask, causal], in this process."""
    import onnxruntime

    from attnopt.plan.timing.timing import in_turn

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.add_session_config_entry("session.set_denormal_as_zero", zeros)
    found = []
    for heads, tokens, width in SHAPES:
        random = np.random.default_rng(0)
        inputs = {name: random.standard_normal((1, heads, tokens, width)).astype(np.float32) for name in "qkv"}
        sessions = {
            kind: onnxruntime.InferenceSession(
                model(heads, tokens, width, causal=kind == "causal"), options, providers=["CPUExecutionProvider"]
            )
            for kind in ("whole", "causal")
        }
        times = in_turn({kind: (lambda s=s, x=inputs: s.run(None, x)) for kind, s in sessions.items()}, seconds=0.5)
        found.append([times["whole"].median, times["causal"].median])
    return found


def measured() -> dict[str, Any]:
    runs: dict[str, list[Any]] = {"0": [], "1": []}
    for _ in range(ROUNDS):
        for zeros, held in runs.items():
            done = subprocess.run([sys.executable, __file__, "--side", zeros], capture_output=True, text=True, check=True)
            held.append(json.loads(done.stdout.splitlines()[-1]))
    return {zeros: np.median(np.array(held), axis=0).tolist() for zeros, held in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anyway", action="store_true", help="measure on a loaded machine; the table says how loaded it was")
    parser.add_argument("--side", choices=("0", "1"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(timed(given.side)))
        return
    busy = min(harness.busy_share() for _ in range(3)) if given.anyway else harness.require_quiet()
    found = measured()
    rows, table = [], []
    for i, (heads, tokens, width) in enumerate(SHAPES):
        (whole, plain), (_, zeros) = found["0"][i], found["1"][i]
        rows.append(Row(heads, tokens, width, whole, plain, zeros))
        table.append(
            [f"{heads} x {tokens} x {width}", *(f"{1e3 * t:.2f}" for t in (whole, plain, zeros)), f"{plain / zeros:.2f}x"]
        )
    ratio = statistics.median(r.causal / r.causal_zeros for r in rows)
    notes = [
        "onnxruntime's Attention (opset 23), float32, milliseconds: without a mask, causal, causal with session.set_denormal_as_zero",
        f"medians of {ROUNDS} processes for each side in turn; the option gives {ratio:.2f}x in the median",
        f"other processes used {busy:.2f} cores when it began, load average {os.getloadavg()[0]:.1f} when it ended",
    ]
    text = harness.markdown(["heads x tokens x width", "no mask", "causal", "causal, zeros", "gain"], table)
    print(text, *notes, sep="\n")
    saved = harness.save("hidden_scores", rows, notes)
    saved.with_suffix(".md").write_text(text + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
