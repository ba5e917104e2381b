"""What each kernel does, as phases: which pairs it computes, what goes through memory, what runs side by side.

    sdpa              products on tiles, scores stay in registers; a causal mask is built in, any other is a tensor that is read
    flex, triton-…    the same, and whole blocks that the mask rules out are not visited
    tvm-…             so too, on a CPU
    local-…           chunks of queries beside the keys of their band
    eager, ort-…      the score matrix is written and read, once or several times

A kernel is priced by its name, as reports print it. One that is not known here is priced as `eager`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from attnopt.cost.mask_nodes import additive, mask_bytes
from attnopt.cost.phase import Phase
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.ir.band import Band, band, chunking
from attnopt.ir.cost import WITHOUT_PAIRS, cost_alone, stored
from attnopt.ir.expr import Term

Tile = tuple[int, int]
SPLIT_KEYS = 512  # keys that one task of a decoding kernel reads at least, where few queries leave units idle
PASSES = {"torch": "elementwise", "onnxruntime": "ort-elementwise"}  # families of nodes that go through a tensor once
HIDDEN = 10.0  # operations of a hidden score, where it costs any: some CPUs are slow on numbers near the smallest float


def phases(kernel: str, problem: Problem, target: Target) -> list[Phase]:
    """The passes of a kernel, in order. `problem.spec` has no `plus`."""
    if problem.spec.normalizer.name in WITHOUT_PAIRS and problem.spec.selection is None:
        return [without_pairs(problem)]
    return KERNELS.get(kernel, eager)(problem, target)


def needs_mask(problem: Problem) -> bool:
    """Whether the kernel reads a mask or a bias as a tensor."""
    spec = problem.spec
    return bool(spec.biases) or (spec.mask is not None and not builtin_causal(problem))


def builtin_causal(problem: Problem) -> bool:
    return problem.spec.mask == Term("causal") and problem.spec.offset is None and not problem.spec.biases


def without_pairs(problem: Problem) -> Phase:
    """A state of d x e numbers is read and updated once per token; no scores are made."""
    known = cost_alone(problem.spec, problem.shape, problem.dtype)
    return Phase("state", "eager", known.flops, 0.0, known.bytes, known.working_set, rows=problem["d"], tasks=problem.heads)


def fused(
    problem: Problem, target: Target, family: str, tile: Tile, *, skips: bool, mask: float = 0.0, packs: bool = False
) -> Phase:
    """Tiles of queries go through the keys that they see. mask: bytes of one that is read as a tensor.

    packs: the heads of a group are rows of one tile, where queries are few.
    """
    packed = problem["h"] // problem["g"] if (packs or target.kind == "gpu") and problem["q"] < tile[0] else 1
    rows, keys = min(tile[0], max(1, problem["q"])), tile[1]
    pairs = problem.heads * (problem.pairs(rows, keys) if skips else problem.all_pairs)
    read = pairs / (rows * packed) * problem.row_bytes  # each tile of queries reads the keys and values of all that it visits
    once = problem.queries_bytes + problem.keys_bytes + mask
    tasks: float = problem.heads * math.ceil(problem["q"] / rows)
    if (packs or target.kind == "gpu") and tasks < target.units:
        tasks = min(target.units, tasks * max(1.0, problem["k"] / SPLIT_KEYS))
    scores, values = 2.0 * pairs * problem["d"], 2.0 * pairs * problem["e"]
    apart = problem.value_type != problem.product_type
    return Phase(
        "attention", family, flops=scores if apart else scores + values, more=apart * values, more_dtype=apart * problem.value_type,
        operations=pairs * (problem.per_score + bool(mask)) + pairs / rows * problem.conversions,
        bytes=once, working_set=once, rereads=max(0.0, read - problem.keys_bytes), rereads_set=problem["k"] * problem.row_bytes,
        rows=rows, tasks=tasks,
    )  # fmt: skip


def sdpa(problem: Problem, target: Target) -> list[Phase]:
    """torch's scaled_dot_product_attention; on a CPU its tiles follow the number of queries."""
    if target.kind == "cpu" and problem["d"] != problem["e"]:
        return eager(problem, target)
    q = problem["q"]
    rows, keys = (256 if q >= 768 else 64 if q >= 192 else 32, 512) if target.kind == "cpu" else (128, 128)
    if not needs_mask(problem):
        return [fused(problem, target, "sdpa", (rows, keys), skips=True)]
    family = "sdpa-masked" if target.kind == "gpu" else "sdpa"  # on a GPU another kernel, on a CPU the same
    masked = fused(problem, target, family, (rows, keys), skips=False, mask=mask_bytes(problem))
    return [*additive(problem, PASSES["torch"]), masked]


def sdpa_repeated(problem: Problem, target: Target) -> list[Phase]:
    return [*repeated(problem, PASSES["torch"]), *sdpa(many_heads(problem), target)]


def wide_values(problem: Problem, target: Target) -> list[Phase]:
    """SDPA for each piece of the values that is as wide as a key, and the pieces put side by side."""
    count = max(1, problem["e"] // problem["d"])
    piece = replace(problem, shape={**problem.shape, "e": problem["e"] // count})
    joined = 2.0 * problem.heads * problem["q"] * problem["e"] * problem.width
    return [*count * sdpa(piece, target), Phase("join", PASSES["torch"], bytes=joined, working_set=joined)]


def blocks(family: str, tile: Tile) -> Callable[[Problem, Target], list[Phase]]:
    """Kernels that visit the blocks that the mask leaves and compute mask and biases inside."""
    return lambda problem, target: [fused(problem, target, family, tile, skips=True)]


def triton_prefill(problem: Problem, target: Target) -> list[Phase]:
    """Kernels of the prefill family; where products are rounded, others make the codes first."""
    return [*coding(problem), fused(problem, target, "triton", (128, 64), skips=True)]


def coding(problem: Problem) -> list[Phase]:
    """Means of keys, ranges of values, codes of all three: q is read once, k twice, v three times; what is made is read later."""
    if problem.spec.precision is None:
        return []
    q, k, v = (
        problem.heads * problem["q"] * problem["d"],
        *(problem["b"] * problem["g"] * problem["k"] * problem[x] for x in "de"),
    )
    moved = problem.width * (q + 2 * k + 3 * v) + problem.keys_bytes + q * stored(problem.spec.precision, "q", problem.width)
    return [Phase("codes", PASSES["torch"], operations=4.0 * (q + k + v), bytes=moved, working_set=moved, launches=9)]


def sparse(problem: Problem, target: Target, family: str, tile: Tile) -> list[Phase]:
    """Tiles are chosen from pooled rows, then computed; a correction computes some rows with all their keys besides."""
    found = [*choosing(problem), fused(problem, target, family, tile, skips=True)]
    clause = problem.spec.correction
    if clause is not None:
        mask = clause.expr_or_none("dense") or problem.spec.mask
        whole = replace(problem, spec=problem.spec.with_(mask=mask, selection=None, correction=None))
        gamma, q = max(1, clause.count(0)), max(1, problem["q"])
        some = min(1.0, 1 / gamma + max(clause.count("tail"), gamma) / q)
        found.append(part(fused(whole, target, family, tile, skips=True), some))
    return found


def choosing(problem: Problem) -> list[Phase]:
    """Queries and keys are read to be pooled, and each pooled query meets each pooled key: 64 rows stand for one, about."""
    if problem.spec.selection is None:
        return []
    rows = problem.heads * problem["q"] * problem["d"] * problem.width + problem.keys_bytes / 2
    tiles = problem.heads * problem.all_pairs / 64**2
    return [Phase("choice", PASSES["torch"], operations=2.0 * rows / problem.width + 20.0 * tiles, bytes=2.0 * rows,
                  working_set=rows, launches=30)]  # fmt: skip


def part(phase: Phase, share: float) -> Phase:
    """Some rows of a phase."""
    return replace(
        phase, flops=share * phase.flops, more=share * phase.more, operations=share * phase.operations,
        rereads=share * phase.rereads, tasks=max(1.0, share * phase.tasks),
    )  # fmt: skip


def tvm_prefill(problem: Problem, target: Target) -> list[Phase]:
    """As blocks that the mask leaves; where queries and keys are rounded, the kernel reads keys twice before, for their mean and codes."""
    made = [fused(problem, target, "tvm", (64, 64), skips=True)]
    if problem.spec.precision is None:
        return made
    keys = problem["b"] * problem["g"] * problem["k"] * problem["d"]
    moved = problem.width * 2.0 * keys + keys
    coded = Phase("codes", "tvm", operations=4.0 * (keys + problem.heads * problem["q"] * problem["d"]), bytes=moved,
                  working_set=moved, launches=0)  # fmt: skip
    return [coded, *made]


def tvm_decode(problem: Problem, target: Target) -> list[Phase]:
    """Few queries on many keys: threads share the keys, whose stored form is widened in registers."""
    return [fused(problem, target, "tvm-decode", (16, 128), skips=True, packs=True)]


def tvm_pages(problem: Problem, target: Target) -> list[Phase]:
    """The bounds of all pages are read, then the keys of those that are chosen."""
    clause = problem.spec.selection
    size = 1 if clause is None else clause.count(0)
    pages = problem["b"] * problem["g"] * problem["k"] / size
    bounds = 2.0 * pages * problem["d"]
    choice = Phase("choice", "tvm-decode", operations=bounds * problem["h"] / problem["g"] + 64.0 * pages, bytes=bounds * problem.width,
                   working_set=bounds * problem.width)  # fmt: skip
    return [choice, *tvm_decode(problem, target)]


def local(problem: Problem, target: Target, *, runtime: str, family: str) -> list[Phase]:
    """Queries in chunks, each beside the keys of its band: keys and values are gathered, then attended to."""
    cut = chunking(band(problem.spec.mask) or Band(0, 0))
    count = math.ceil(problem["q"] / cut.rows)
    spec = problem.spec.with_(mask=None, score=tuple(c for c in problem.spec.score if c.name != "add"))
    chunk = replace(problem, spec=spec, shape={**problem.shape, "b": problem["b"] * count, "q": cut.rows, "k": cut.keys})
    copied = 2.0 * (chunk.queries_bytes + chunk.keys_bytes)
    pairs = problem["b"] * count * cut.rows * cut.keys  # one mask for all heads
    before = [
        Phase("gather", f"{family}-chunks", bytes=copied, working_set=copied),
        Phase("mask", PASSES[runtime], operations=3.0 * pairs, bytes=4.0 * pairs * problem.width,
              working_set=pairs * problem.width, launches=12),
    ]  # fmt: skip
    if runtime == "torch":
        return [*before, fused(chunk, target, family, (cut.rows, cut.keys), skips=False, mask=pairs * problem.width)]
    seen = problem.heads * problem.pairs()
    return [
        *before,
        *spelled_out(chunk, runtime, pairs * problem.width, family),
        *hidden(chunk.heads * chunk.all_pairs - seen, target),
    ]


def eager(problem: Problem, target: Target, *, runtime: str = "torch") -> list[Phase]:
    """Product, score terms, softmax, product as nodes of their own: each reads and writes the score matrix."""
    grown = many_heads(problem)
    before = [*repeated(problem, PASSES[runtime]), *additive(problem, PASSES[runtime])]
    if runtime == "torch":
        return [*before, *spelled_out(grown, runtime, mask_bytes(problem), "eager")]
    unseen = problem.heads * (problem.all_pairs - problem.pairs())
    return [*before, *spelled_out(grown, runtime, mask_bytes(problem), "ort-eager"), *hidden(unseen, target)]


def hidden(scores: float, target: Target) -> list[Phase]:
    """onnxruntime's softmax computes the exponential of a hidden score too, by numbers below the smallest normal float.

    CPUs that take such numbers out of their pipelines spend more on them than on the rest of the kernel
    (`session.set_denormal_as_zero` makes them zeros; no graph can ask for it).
    """
    return (
        [Phase("hidden scores", "ort-hidden", operations=HIDDEN * scores, launches=0)]
        if scores > 0 and target.kind == "cpu"
        else []
    )


def spelled_out(problem: Problem, runtime: str, mask: float, family: str) -> list[Phase]:
    scores = problem.heads * problem.all_pairs
    matrix = scores * problem.width
    terms = len(problem.spec.score) - len(problem.spec.biases)
    passes = [
        Phase("scores", PASSES[runtime], operations=scores, bytes=2.0 * matrix, working_set=2.0 * matrix) for _ in range(terms)
    ]
    if mask:
        passes.append(Phase("scores", PASSES[runtime], operations=scores, bytes=2.0 * matrix + mask, working_set=2.0 * matrix))
    softmax = Phase("softmax", f"{family}-softmax", operations=5.0 * scores, bytes=2.0 * matrix, working_set=2.0 * matrix)
    first, second = (product(problem, scores, matrix, problem[axis], family) for axis in "de")
    return [first, *passes, softmax, second]


def product(problem: Problem, scores: float, matrix: float, width: int, family: str) -> Phase:
    """Scores from queries and keys, or output from scores and values: [Q, K] by width for every head."""
    operands = problem.heads * (problem["q"] + problem["k"]) * width * problem.width
    return Phase("products", family, flops=2.0 * scores * width, bytes=matrix + operands, working_set=matrix + operands,
                 rows=problem["q"], tasks=problem.heads * math.ceil(problem["q"] / 128))  # fmt: skip


def by_head(problem: Problem, target: Target, family: str, *, builtin: bool, exponentials: bool = True) -> list[Phase]:
    """onnxruntime's operators: one call, in which each head makes its whole score matrix; what is hidden is not normalised.

    exponentials: whether those of hidden scores are computed.

    A mask that is not built in is a tensor, and is copied for every head before its scores are added to it.
    """
    scores = problem.heads * problem.all_pairs
    seen = problem.heads * (problem.pairs() if builtin else problem.all_pairs)
    head = problem.all_pairs * problem.width
    masked = 0.0 if builtin else mask_bytes(problem)
    once = problem.queries_bytes + problem.keys_bytes + masked
    passes = 4.0 + (2.0 if masked else 0.0)  # written, normalised in place, read; the mask copied in
    call = Phase(
        "attention", family, flops=2.0 * scores * (problem["d"] + problem["e"]), operations=seen * problem.per_score,
        bytes=once, working_set=once, rereads=passes * problem.heads * head, rereads_set=head * min(problem.heads, max(1, target.units)),
        rows=problem["q"], tasks=problem.heads,
    )  # fmt: skip
    unseen = hidden(problem.heads * (problem.all_pairs - problem.pairs()), target) if exponentials else []
    return [*([] if builtin else additive(problem, PASSES["onnxruntime"])), call, *unseen]


def ort_gqa(problem: Problem, target: Target) -> list[Phase]:
    return [*turned(problem), *by_head(problem, target, "ort-gqa", builtin=True, exponentials=False)]


def ort_mha(problem: Problem, target: Target) -> list[Phase]:
    """Grouped heads are repeated first. Without mask it works on tiles; a causal mask is built in but not skipped."""
    grown = many_heads(problem)
    before = [*repeated(problem, PASSES["onnxruntime"]), *turned(grown)]
    if problem.spec.mask is None and not problem.spec.biases:
        return [*before, fused(grown, target, "ort-mha-tiles", (64, 64), skips=False)]
    return [*before, *by_head(grown, target, "ort-mha", builtin=builtin_causal(problem))]


def onnx_attention(problem: Problem, target: Target) -> list[Phase]:
    before = [] if problem.heads_first else [copied(problem, "ort-transpose", 3)]
    return [*before, *by_head(problem, target, "onnx-attention", builtin=builtin_causal(problem))]


def turned(problem: Problem) -> list[Phase]:
    """Operators that read [B, L, H * D] turn it inside; where heads come first, it is turned before as well."""
    return [copied(problem, "ort-transpose", 4)] * (2 if problem.heads_first else 1)


def copied(problem: Problem, family: str, launches: int) -> Phase:
    moved = 2.0 * (problem.queries_bytes + problem.keys_bytes)
    return Phase("transpose", family, bytes=moved, working_set=moved, launches=launches)


def many_heads(problem: Problem) -> Problem:
    """The same with a key head for every query head."""
    return problem if problem["h"] == problem["g"] else replace(problem, shape={**problem.shape, "g": problem["h"]})


def repeated(problem: Problem, family: str) -> list[Phase]:
    """Keys and values of grouped heads written out for every query head."""
    if problem["h"] == problem["g"]:
        return []
    moved = problem.keys_bytes + many_heads(problem).keys_bytes
    return [Phase("repeat", family, bytes=moved, working_set=moved, launches=4)]


KERNELS: dict[str, Callable[[Problem, Target], list[Phase]]] = {
    "sdpa": sdpa,
    "sdpa-repeated": sdpa_repeated,
    "wide-values-sdpa": wide_values,
    "flex": blocks("flex", (128, 128)),
    "tvm-prefill": tvm_prefill,
    "tvm-sparse": partial(sparse, family="tvm", tile=(64, 64)),
    "triton-sparse": partial(sparse, family="triton", tile=(128, 64)),
    "tvm-decode": tvm_decode,
    "tvm-pages": tvm_pages,
    "tvm-pieces": tvm_decode,
    "tvm-blocks": tvm_decode,
    "triton-prefill": triton_prefill,
    "triton-decode": blocks("triton", (16, 64)),
    "local-sdpa": partial(local, runtime="torch", family="local-sdpa"),
    "local-attention": partial(local, runtime="onnxruntime", family="local-attention"),
    "ort-gqa": ort_gqa,
    "ort-mha": ort_mha,
    "onnx-attention": onnx_attention,
    "eager": eager,
    "ort-eager": partial(eager, runtime="onnxruntime"),
}
