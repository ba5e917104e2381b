"""The contenders of a row, each as a call that has run once, or the reason why it does not run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu.case import Case, Data
from gpu.flex import flex
from gpu.ours import Prepare, kernels
from gpu.sdpa import BACKENDS, NotSaid, sdpa, varlen

OURS = "attnopt"
PACKED = ("documents", "window")  # what flash for packed lengths is asked for: it is the only kernel of torch that has them
PEERS: dict[str, Callable[[Case, Data], Callable[[], Tensor]]] = {
    **{name: partial(sdpa, name) for name in BACKENDS},
    "varlen": varlen,
    "flex": flex,
}


class GpuLost(Exception):
    """The GPU answers no more: nothing after this can be measured in this process."""


def contenders(case: Case) -> dict[str, Prepare]:
    """Low-precision caches and products have no peers."""
    whole = case.cache == "bf16" and not case.rounded
    named = {name: peer for name, peer in PEERS.items() if whole and (name != "varlen" or case.mask in PACKED)}
    return named | kernels(case)


def ready(case: Case, data: Data) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Calls of all that can compute the case, and what is wrong with the others."""
    calls: dict[str, Callable[[], Tensor]] = {}
    reasons: dict[str, str] = {}
    for name, prepare in contenders(case).items():
        try:
            call = prepare(case, data)
            call()
            finish()
        except NotSaid as reason:
            reasons[name] = str(reason)
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except Exception as failure:  # whatever a library says, the other rows must go on
            reasons[name] = first_line(failure)
            finish()
        else:
            calls[name] = call
    return calls, reasons


def finish() -> None:
    """Wait for the GPU. Raises GpuLost where it has stopped: every later call would raise the same."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as failure:
            raise GpuLost(first_line(failure)) from failure


def first_line(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[0][:80]
