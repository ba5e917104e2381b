"""A cache in codes for a live model, under the budget that its rewrites are under too.

    passes int8-cache, int4-cache, akvq-vl, …   ->   clauses of a cache, each measured on the live model   ->   the fewest bytes that hold

A graph traced on a prompt has no cache, so these passes have no site there; what they ask for is tried where the cache is. Where tokens
are rounded one by one, a text read at once loses on a cache in codes what prompt and generation lose together: every position is judged.
Where the newest tokens stay exact, a position hangs on how many come behind it in the same call: of a text that is read at once, most
would find no exact token before them, unlike any that is generated. So the first half of a text is a prompt, and the other comes PIECE
tokens at a time: each position has at most so many exact tokens less than where it comes alone, and none more. All are judged there too.
A cache in blocks means the same of a text that is read at once as of its tokens one by one, so all of them are judged as they are.
The loss is that of codes and rewrites, against the original. One half of the data chooses, on the other the 95 % bound is within the
whole budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.calibration import Calibration
from attnopt.errors import AttnoptError, InputMismatch
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.coded import bytes_per_token, fresh
from attnopt.hosts.eviction.ends import Ends
from attnopt.hosts.eviction.live_forms import empty_side, keeps_blocks, keeps_ends, live_form, starts_of
from attnopt.hosts.module.copying import shared_copy
from attnopt.ir.by_layer import ByLayer, CacheForm, clauses_of
from attnopt.ir.exact_ends import ExactEnds, exact_ends
from attnopt.ir.spec import as_spec
from attnopt.ir.token_blocks import TokenBlocks, token_blocks
from attnopt.passes import Pass
from attnopt.passes.edits.caches.state import Kept, clause
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.passes.kvcache.int2_cache import Int2Cache
from attnopt.passes.kvcache.int4_cache import Int4Cache
from attnopt.passes.kvcache.int8_cache import Int8Cache
from attnopt.passes.kvcache.zip_cache import ZipCache
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.quality import Loss, kl
from attnopt.plan.live.evicting import judged
from attnopt.plan.live.layers import LENGTH

METRIC = "mean KL"
CODES = (Int8Cache, Int4Cache, Int2Cache)
ENDS = (AkvqVl,)  # they keep tokens at both ends exactly
BLOCKS = (ZipCache,)  # they round blocks of tokens
PIECE = 16  # tokens
OfText = Callable[[AkvqVl], Iterable[int]]


def is_cache_pass(given: Pass) -> bool:
    return isinstance(given, (*CODES, *ENDS, *BLOCKS))


def forms(passes: Sequence[Pass], of_text: OfText = lambda _: ()) -> list[str]:
    """The clauses that these passes ask for: values alone, where that is one of theirs, and both sides.

    of_text: the layers that a pass which asks for them finds to read their text.
    """
    found: list[CacheForm] = []
    lines: list[str] = []
    for each in passes:
        if isinstance(each, CODES):
            kept = Kept(each.rows)
            sides = [{"k": kept, "v": kept}] if isinstance(each, Int2Cache) else [{"v": kept}, {"k": kept, "v": kept}]
            found += [clause(side) for side in sides]
        elif isinstance(each, AkvqVl):
            pivots, text = (clause({"k": kept, "v": kept}) for kept in (each.kept(False), each.kept(True)))
            at = tuple(of_text(each))
            found += [pivots, *([ByLayer(pivots, tuple((index, text) for index in at))] if at else [])]
        elif isinstance(each, ZipCache):
            lines += [form.words_of_a_spec for form in blocks_of(each) if is_said(form)]
    return [*(str(each) for each in found), *lines]


def blocks_of(given: ZipCache) -> list[TokenBlocks]:
    return [TokenBlocks(given.block, round(share * given.block)) for share in given.shares]


def is_said(form: TokenBlocks) -> bool:
    """Whether a clause says how many tokens are salient, as it does of half of them and of all."""
    clause = as_spec(f"softmax {form.words_of_a_spec}").cache
    return clause is not None and token_blocks(clause) == form


@dataclass(frozen=True)
class Coded:
    """One form of the cache: bytes of a token, of LENGTH where that counts, and losses on both halves of the data (None: not asked for)."""

    words: str
    bytes: float
    loss: Loss
    held: Loss | None = None


def coded(
    model: Any,
    original: Any,
    data: Calibration,
    budget: Budget,
    passes: Sequence[Pass],
    seed: int,
    timed: Callable[[str], tuple[bool, str]] | None = None,
    of_text: OfText = lambda _: (),
) -> tuple[str | None, list[str]]:
    """The form that a model's cache is kept in, or None, and what the report says of it.

    model: with its rewrites. timed: whether a form is fast enough, and what was measured, where time counts. of_text: as of `forms`.
    """
    unsaid = [form for p in passes if isinstance(p, ZipCache) for form in blocks_of(p) if not is_said(form)]
    said = [f"{x.salient} of {x.block} tokens salient: a live cache has half or all; traced graphs take it" for x in unsaid]
    tried = forms(passes, of_text)
    if not tried:
        return None, said
    if not judged(budget):
        return None, [*said, f"no cache in codes: its loss is a KL of the next token, and the budget is in {budget.metric}"]
    choosing, holding = data.split(seed)
    whole = weighed(model, original, choosing, None, seed)
    found: list[Coded] = []
    for words in tried:
        try:
            found.append(weighed(model, original, choosing, words, seed))
        except AttnoptError as failure:
            said.append(f"no {words}: {failure}")
    taken: Coded | None = None
    for one in sorted(found, key=lambda x: (x.bytes, x.loss.mean)):
        if taken is not None or one.bytes >= whole.bytes:
            said.append(f"{one.words}: {one.bytes:.0f} bytes a token, no less than what was taken")
        elif one.loss.upper > budget.allowed:
            said.append(f"{one.words}: loses at most {one.loss.upper:.3g}, over the budget")
        elif (held := weighed(model, original, holding, one.words, seed).loss).upper > budget.allowed:
            said.append(f"{one.words}: loses at most {held.upper:.3g} on the texts held back, over the budget")
        else:
            fast, measured = (True, "") if timed is None else timed(one.words)
            said += [f"{one.words}: {measured}"] if measured else []
            taken = replace(one, held=held) if fast else None
    if taken is None:
        return None, [f"the cache stays as it is, {whole.bytes:.0f} bytes a token", *said]
    line = f"the cache is kept as {taken.words}: {taken.bytes:.0f} bytes a token in place of {whole.bytes:.0f}"
    return taken.words, [f"{line}; with the rewrites {taken.held}, without it {whole.loss.mean:.3g}", *said]


@torch.no_grad()
def weighed(model: Any, original: Any, data: Calibration, words: str | None, seed: int) -> Coded:
    """words: a clause of a cache; None leaves it as it is."""
    form, losses, token = live_form(words), [], 0.0
    if form is not None and keeps_blocks(form):
        model = shared_copy(model)  # whose attention goes another way from then on
    device = next(model.parameters()).device
    for batch in data.batches:
        given = {name: x.to(device) for name, x in batch.items()}
        logits, cache = read(model, given, form)
        losses += of_rows(original(**given, use_cache=False).logits, logits, given)
        token = bytes_per_token(cache) if form is None or exact_beside(form) is None else bytes_at(cache, LENGTH)
    return Coded(words or "", token, Loss.of(METRIC, losses, seed))


def read(model: Any, given: Mapping[str, Tensor], form: CacheForm | None) -> tuple[Tensor, Any]:
    """Logits of all positions, and the cache behind them."""
    exact = None if form is None else exact_beside(form)
    if exact is not None:
        require_codes(given["input_ids"].shape[1], exact)
    if form is None or not keeps_ends(form):
        made = model(**given, use_cache=True, past_key_values=None if form is None else fresh(model, form))
        return made.logits, made.past_key_values
    ids, mask = given["input_ids"], given["attention_mask"]
    length = ids.shape[1]
    cache, found = fresh(model, form, starts_of(mask)), []
    for first, end in pairwise([0, *range(length // 2, length, PIECE), length]):
        made = model(input_ids=ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        found.append(made.logits)
    return torch.cat(found, 1), cache


def exact_beside(form: CacheForm) -> int | None:
    """How many tokens at most a layer holds exactly beside codes; None where all are in codes."""
    ends, blocks = ([kind(clause) for clause in clauses_of(form)] for kind in (exact_ends, token_blocks))
    counts = [x.first + x.recent for x in ends if isinstance(x, ExactEnds)] + [
        x.block for x in blocks if isinstance(x, TokenBlocks)
    ]
    return max(counts, default=None)


def require_codes(length: int, exact: int) -> None:
    """Raises InputMismatch for texts of which too few tokens come to be codes."""
    if length - exact < length // 4:
        raise InputMismatch(
            f"of texts of {length} tokens {exact} stay exact, which says little of longer ones",
            next_move="Give batches of longer texts as input_ids.",
        )


def bytes_at(cache: Any, length: int) -> float:
    """Of each token of one sequence, where layers like those of a cache hold so many: exact tokens weigh the less the more there are."""
    total = 0.0
    for layer in cache.layers:
        if isinstance(layer, BlockLayer) and layer.state.length:
            state = layer.empty()
            state.take(*(x.new_zeros(1, x.shape[1], length, x.shape[3]) for x in (layer.keys, layer.values) if x is not None))
            total += state.bytes / length
            continue
        for side, x in (("k", layer.keys), ("v", layer.values)):
            if isinstance(getattr(layer, side, None), Ends):
                total += empty_side(layer.clause, side).grown(x.new_zeros(1, x.shape[1], length, x.shape[3])).bytes / length
            else:
                total += x.nbytes / len(x) / layer.get_seq_length()
    return total


def of_rows(before: Tensor, after: Tensor, given: Mapping[str, Tensor]) -> list[float]:
    """The loss of each text, padding left out."""
    mask = given["attention_mask"].bool()
    return [kl(a[there], b[there]) for a, b, there in zip(before, after, mask, strict=True)]
