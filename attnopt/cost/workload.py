"""What a model will be asked to do: shapes with weights, for which a plan is made.

    prefill:4096                     one prompt of 4,096 tokens
    prefill:512-4096x2 decode:32768x8@0.9
        two prompts of 512 to 4,096 tokens, and, nine times as heavy, one more token for each of 8 sequences of 32,768

A range stands for lengths spread evenly by their logarithm; a distribution is several parts with weights. A plan minimises the
weighted sum of times. `bind` turns the shapes into values of a model's symbolic sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attnopt.errors import WorkloadError
from attnopt.ir.dims import Dim, evaluate, parts, terms_of
from attnopt.ir.site import Site

KINDS = ("prefill", "decode")
EXAMPLE = "Write it like 'prefill:4096 decode:32768x8@0.7' or 'prefill:512-4096'."
PART = re.compile(r"(?P<kind>[a-z]+):(?P<low>\d+)(?:-(?P<high>\d+))?(?:x(?P<batch>\d+))?(?:@(?P<weight>\d*\.?\d+(?:e-?\d+)?))?")
POINTS = 5  # lengths that stand for a range


@dataclass(frozen=True)
class Load:
    """One shape: `batch` sequences, each with `query` new tokens after `past` that are known. weight: its share of the whole, sum 1."""

    kind: str
    batch: int
    query: int
    past: int
    weight: float

    @property
    def keys(self) -> int:
        return self.past + self.query

    def __str__(self) -> str:
        length = self.query if self.kind == "prefill" else self.past
        return f"{self.kind}:{length}" + f"x{self.batch}" * (self.batch != 1)


@dataclass(frozen=True)
class Bound:
    """One load as values of a model's symbolic sizes, to `ir.dims.evaluate` shapes with."""

    load: Load
    sizes: Mapping[str, int]

    @property
    def weight(self) -> float:
        return self.load.weight

    def shape(self, site: Site) -> dict[str, int]:
        """b, h, g, q, k, d, e of a site under this load. Raises WorkloadError for a size that no length of the load decides."""
        try:
            return {axis: evaluate(dim, self.sizes) for axis, dim in site.shape.items()}
        except KeyError as unknown:
            raise WorkloadError(
                f"the size {unknown} of the model is decided by no length of '{self.load}'", where=site.name,
                next_move="Fix it when the model is exported.",
            ) from None  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Loads whose weights sum to 1."""

    loads: tuple[Load, ...]
    text: str = ""

    def __str__(self) -> str:
        return self.text or " ".join(f"{load}@{load.weight:g}" for load in self.loads)

    def bind(self, sites: Sequence[Site]) -> tuple[Bound, ...]:
        """Each load as values of the symbolic sizes of the sites of one model. Raises WorkloadError for what the model cannot do."""
        return tuple(Bound(load, sizes_for(load, sites)) for load in self.loads)


def parse_workload(text: str | Iterable[str]) -> Workload:
    """The workload that a line (or its words) spells. Raises WorkloadError, which shows the word at fault and an example."""
    words = text.split() if isinstance(text, str) else [word for part in text for word in part.split()]
    if not words:
        raise WorkloadError("no shapes are given", next_move=EXAMPLE)
    loads = [load for word in words for load in read(word)]
    whole = sum(load.weight for load in loads)
    shares = tuple(Load(x.kind, x.batch, x.query, x.past, x.weight / whole) for x in loads)
    return Workload(shares, " ".join(words))


def read(word: str) -> list[Load]:
    """The loads of one word, their weights as written."""
    found = PART.fullmatch(word)
    if found is None:
        raise WorkloadError(f"'{word}' is no shape: a kind, a length, then 'x' batch and '@' weight if wanted", next_move=EXAMPLE)
    kind, low, batch = found["kind"], int(found["low"]), int(found["batch"] or 1)
    high, weight = int(found["high"] or low), float(found["weight"] or 1.0)
    wrong = (
        f"'{kind}' is neither of {' and '.join(KINDS)}" if kind not in KINDS
        else "a length of 0 holds no token" if low == 0
        else f"the range ends at {high}, before it begins" if high < low
        else "a batch of 0 holds no sequence" if batch == 0
        else "a weight of 0 says nothing; leave the shape out" if weight == 0
        else ""
    )  # fmt: skip
    if wrong:
        raise WorkloadError(f"{wrong} (in '{word}')", next_move=EXAMPLE)
    lengths = spread(low, high)
    return [Load(kind, batch, 1 if kind == "decode" else n, n if kind == "decode" else 0, weight / len(lengths)) for n in lengths]


def spread(low: int, high: int) -> list[int]:
    """Both ends and lengths between them, evenly by their logarithm, each once."""
    if low == high:
        return [low]
    return sorted({round(low * (high / low) ** (i / (POINTS - 1))) for i in range(POINTS)})


def sizes_for(load: Load, sites: Sequence[Site]) -> dict[str, int]:
    """Values of the symbols in the batch, the queries and the keys of every site."""
    sizes: dict[str, int] = {}
    for site in sites:
        settle(site.size("b"), load.batch, sizes, "batch", load, site)
        settle(site.size("q"), load.query, sizes, "new tokens", load, site)
    for site in sites:
        keys = site.size("k")
        if isinstance(keys, int):  # a fixed cache, or a fixed source
            if keys < load.keys and site.size("q") != keys:
                raise impossible(load, site, f"it holds at most {keys} keys, and {load.keys} are asked for")
            continue
        if keys == site.size("q"):
            if load.past:
                raise impossible(load, site, f"it has no past: queries and keys are one length, {keys}", cache=True)
            continue
        settle(keys, load.keys, sizes, "keys", load, site)
    return sizes


def settle(dim: Dim, size: int, sizes: dict[str, int], what: str, load: Load, site: Site) -> None:
    """Give the symbols of one dimension values that make it `size`: of a sum, what is left goes to the symbol not known yet."""
    try:
        held = evaluate(dim, sizes)
    except KeyError:
        held = None
    if held is not None:
        if held != size:
            raise impossible(load, site, f"its {what} are {held} and cannot be {size}")
        return
    coefficient, names = parts(dim)
    sums = terms_of(dim)
    if sums is None or any(len(key) > 1 for key in sums):  # text that only the graph understands: the whole is what we are told
        if coefficient == 1 and len(names) == 1:
            sizes[names[0]] = size
            return
        raise impossible(load, site, f"its {what} are {dim}, which says nothing of one length")
    unknown = [key[0] for key in sums if key and key[0] not in sizes]
    rest = size - sum(c * (sizes[key[0]] if key else 1) for key, c in sums.items() if not key or key[0] in sizes)
    factor = sums[(unknown[0],)]
    if len(unknown) > 1 or rest < 0 or rest % factor:
        raise impossible(load, site, f"its {what} are {dim} and cannot be {size}")
    sizes[unknown[0]] = rest // factor


def impossible(load: Load, site: Site, why: str, *, cache: bool = False) -> WorkloadError:
    other = (
        "Ask for prefill, or export the model with its cache as inputs." if cache else "Ask for a shape that the model can have."
    )
    return WorkloadError(f"the model cannot do '{load}': {why}", where=site.name, next_move=other)
