"""kvpress on the same subjects, by the same lines, run in an environment of its own; prints one JSON row a line.

    PYTHONPATH=benchmarks <python with kvpress> -m eviction.peers --keep 0.25 --filters filters.pt [--quick]

It wants an older transformers than attnopt. Its Q-Filters are downloaded for known models only, and so are given here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

import kvpress
import torch

from eviction import subjects
from eviction.subjects import Recall, Subject


class GivenFilters(kvpress.QFilterPress):
    """With filters [layers, key heads, channels] at hand. kvpress's are turned away from queries."""

    def post_init_from_model(self, model: torch.nn.Module) -> None:
        pass


def presses(keep: float, window: int, filters: torch.Tensor) -> dict[str, kvpress.BasePress]:
    ratio = 1.0 - keep
    given = GivenFilters(compression_ratio=ratio)
    given.q_filters = -filters
    return {
        "sinks-window": kvpress.StreamingLLMPress(ratio, n_sink=4),
        "key-norm, all layers": kvpress.KnormPress(ratio),
        "snapkv": kvpress.SnapKVPress(ratio, window_size=window, kernel_size=5),
        "expected-attention": kvpress.ExpectedAttentionPress(ratio),
        "q-filters": given,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", required=True)
    parser.add_argument("--filters", required=True)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    filters = torch.load(given.filters, weights_only=True)
    chosen = (subjects.code(given.quick), subjects.recall(given.quick), subjects.recall(given.quick, 32))
    for keep in given.keep:
        for subject in chosen:
            for name, press in presses(keep, given.window, filters[subject.model.config.hidden_size]).items():
                try:
                    print(json.dumps(row(subject, name, keep, press)), flush=True)
                except Exception as error:
                    print(f"{subject.name} {name} {keep}: {error!r}", file=sys.stderr)


def row(subject: Subject, name: str, keep: float, press: kvpress.BasePress) -> dict[str, object]:
    @contextlib.contextmanager
    def compressing():  # type: ignore[no-untyped-def]
        with press(subject.model):
            yield None

    logits, _ = subject.logits(compressing)
    values = subject.accuracy(logits) if isinstance(subject, Recall) else subjects.nats(subject, logits)
    return {"subject": subject.name, "method": name, "keep": keep, "values": values.tolist()}


if __name__ == "__main__":
    main()
