"""Points for the cost model on a GPU: the cases of the GPU benchmark, each with the kernels that the model prices.

    points(cases())   ->   (case, ("triton-prefill", "sdpa", "eager")), …       on_gpu(case, names, device)   ->   seconds by kernel

Documents are left out: how many pairs they hide stands in data, which the model does not see. Scores that would not fit are not spelled
out, and torch's kernel is not asked for what it cannot say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.cost.fit import Sample
from attnopt.cost.kernels import phases
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.ir.spec import parse
from attnopt.plan.calibrate.point_grid import share
from gpu.case import SOFTCAP, Case, Data, make
from gpu.clock import in_turn
from gpu.order import TOKENS, rows
from gpu.ours import OURS, kernels
from gpu.peers import finish, first_line
from gpu.sdpa import NotSaid, mask_tensor

DTYPE, DTYPE_WORD = "bfloat16", "bf16"  # for the cost model, and in the words of a case
LENGTHS = (2048, 8192)
SCORES = 6 << 30  # bytes of a score matrix that is spelled out
Call = Callable[[], Tensor]
Timer = Callable[[Case, Sequence[str], torch.device], tuple[dict[str, float], dict[str, str]]]


def shape_of(case: Case) -> dict[str, int]:
    sizes = (case.batch, case.heads, case.key_heads, case.q_len, case.kv_len, case.width, case.width)
    return dict(zip("bhgqkde", sizes, strict=True))


def cases() -> list[Case]:
    """Those of the GPU benchmark, and prefills of lengths between, so that what judges is more than 200 points."""
    between = [
        replace(c, q_len=n, kv_len=n, batch=TOKENS // n) for c in rows() if c.kv_len == 4096 and c.q_len > 1 for n in LENGTHS
    ]
    return list(dict.fromkeys([*rows(), *between]))


def points(cases: Sequence[Case]) -> Iterator[tuple[Case, tuple[str, ...]]]:
    for case in cases:
        if case.mask == "documents":
            continue
        found = [f"triton-{case.kind}"]
        if case.cache == DTYPE_WORD and not case.rounded:
            found += ["sdpa"] * (case.mask != "softcap")
            found += ["eager"] * (2 * case.batch * case.heads * case.q_len * case.kv_len <= SCORES)
        yield case, tuple(found)


def prepared(kernel: str, case: Case, data: Data) -> Call:
    """The kernel on these data as it is timed. Raises NotSaid for what it cannot compute."""
    if kernel.startswith("triton"):
        return kernels(case)[OURS](case, data)
    return sdpa(case, data) if kernel == "sdpa" else eager(case, data)


def sdpa(case: Case, data: Data) -> Call:
    """With the backend that torch takes itself."""
    added, causal = mask_tensor(case, data), case.mask == "causal"
    options = {"scale": case.width**-0.5, "enable_gqa": case.heads != case.key_heads}
    return lambda: F.scaled_dot_product_attention(data.q, data.k, data.v, attn_mask=added, is_causal=causal, **options)


def eager(case: Case, data: Data) -> Call:
    """Products, terms, softmax and mask as nodes of their own."""
    scale, repeats, capped = case.width**-0.5, case.heads // case.key_heads, case.mask == "softcap"
    added = causal(case, data) if case.mask in ("causal", "softcap") else mask_tensor(case, data)

    def call() -> Tensor:
        k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (data.k, data.v))
        scores = (data.q @ k.mT) * scale
        scores = torch.tanh(scores / SOFTCAP) * SOFTCAP if capped else scores
        if added is not None:
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
        return scores.softmax(-1) @ v

    return call


def causal(case: Case, data: Data) -> Tensor:
    rows, columns = (torch.arange(n, device=data.q.device) for n in (case.q_len, case.kv_len))
    return rows[:, None] >= columns


def on_gpu(case: Case, names: Sequence[str], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each kernel that runs, in turn on the same data, and why the others do not."""
    data = make(case, device, torch.Generator(device).manual_seed(0))
    ready, reasons = dict[str, Call](), dict[str, str]()
    for name in names:
        try:
            call = prepared(name, case, data)
            call()
            finish()
            ready[name] = call
        except NotSaid as reason:
            reasons[name] = str(reason)
        except Exception as failure:  # of any library, or memory: the others go on, unless the GPU does not
            reasons[name] = first_line(failure)
            finish()
    return (in_turn(ready) if ready else {}), reasons


def sample(case: Case, kernel: str, seconds: float, target: Target) -> Sample:
    """The same for a fit of shares."""
    problem = Problem(parse(case.spec), shape_of(case), DTYPE)
    return Sample(tuple(phases(kernel, problem, target)), problem.product_type, seconds)


def of_fit(case: Case, parts: int) -> bool:
    """Whether the shares are fitted on the points of this case; the others judge them."""
    return share(case.spec, shape_of(case), parts) == 0
