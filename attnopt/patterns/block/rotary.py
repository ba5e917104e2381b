"""Rotary position embedding, from the terms of an operand's channels, in whatever spelling.

    channel c:  x[c] * cos(p * f),  -x[c + 4] * sin(p * f)        channel c + 4:  x[c + 4] * cos(p * f),  x[c] * sin(p * f)
        ->  Rotary(dims=8, first=0, interleaved=False, inv_freq=f, positions=p)

Every channel is checked: its partner turns the other way by the same angle, all heads alike. Frequencies are read from the constant
in the graph, or from a constant table of cosines and sines that is proved, row by row, to be one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnopt.ir.block import Rotary
from attnopt.ir.layout import Operand
from attnopt.patterns.block.angles import Angle, Angles
from attnopt.patterns.block.terms import NotRead, Numbers, Term, Walk


@dataclass(frozen=True)
class Part:
    """For the channels of `mask`: what is read (`of` numbers the channels of x), times a factor, cos or sin of an angle."""

    mask: Numbers
    of: Numbers
    factor: float
    wave: str
    angle: Angle | None


def rotary(walk: Walk, terms: list[Term], heads: int) -> tuple[Rotary, Term]:
    """The rotation that these terms are, and the term of what it turns. Raises NotRead for anything else."""
    first = terms[0]
    if any(term.value is not first.value for term in terms):
        names = sorted({term.node.name if term.node is not None else term.value.name for term in terms})
        raise NotRead(f"its channels come from {len(names)} values ({', '.join(names)})", first.node)
    parts = [part for term in terms for part in parts_of(walk, term)]
    count = len(first.mask)
    waves = {wave: merged([p for p in parts if p.wave == wave], count, first) for wave in ("plain", "cos", "sin")}
    plain, cos, sin = (waves[name] for name in ("plain", "cos", "sin"))
    turned = cos.mask
    if not np.array_equal(turned, sin.mask) or (turned & plain.mask).any() or not (turned | plain.mask).all():
        raise NotRead("some channels have a cosine without a sine, or neither", first.node)
    if np.any(plain.factor[plain.mask] != 1.0):
        raise NotRead("the channels that do not turn are scaled", first.node)
    dims, start, interleaved = pairs(cos, sin, turned.reshape(heads, -1), first)
    scaling = float(cos.factor[turned][0])
    if not np.allclose(cos.factor[turned], scaling) or not np.allclose(np.abs(sin.factor[turned]), abs(scaling)):
        raise NotRead("cosines and sines are scaled differently", first.node)
    frequency, positions = frequencies(cos, sin, first)
    own = frequency.reshape(heads, -1)[0, start : start + dims]
    kept, mate = (own[0::2], own[1::2]) if interleaved else (own[: dims // 2], own[dims // 2 :])
    if not np.array_equal(kept, mate) or not np.array_equal(frequency, np.tile(frequency.reshape(heads, -1)[0], heads)):
        raise NotRead("partners or heads turn by different angles", first.node)
    table = torch.from_numpy(np.ascontiguousarray(kept))
    made = Rotary(dims, start, interleaved, table.to(torch.float32), base_of(table, dims), scaling, positions)
    # What channel c reads without its partner is the same channel before the rotation.
    source = np.where(turned, cos.number, plain.number)
    holders = [t for t in terms if (t.mask & (source == walk.channel(t)[0])).any()]
    return made, gathered(walk, holders, source)


@dataclass
class Merged:
    """The parts of one kind, channel by channel."""

    mask: Numbers
    number: Numbers
    factor: Numbers
    angles: list[tuple[Numbers, Angle]]


def merged(parts: list[Part], count: int, at: Term) -> Merged:
    whole = Merged(np.zeros(count, bool), np.zeros(count, np.int64), np.zeros(count), [])
    for part in parts:
        if (whole.mask & part.mask).any():
            raise NotRead("a channel is added up from more than two others", at.node)
        whole.mask |= part.mask
        whole.number[part.mask], whole.factor[part.mask] = part.of[part.mask], part.factor
        if part.angle is not None:
            whole.angles.append((part.mask, part.angle))
    return whole


def parts_of(walk: Walk, term: Term) -> list[Part]:
    number, _ = walk.channel(term)
    if not term.factors:
        return [Part(term.mask, number, term.coefficient, "plain", None)]
    if len(term.factors) > 1:
        raise NotRead("several tables are multiplied", term.node)
    found = Angles(walk).waves(term.factors[0])
    return [Part(wave.mask & term.mask, number, term.coefficient * wave.factor, wave.name, wave.angle) for wave in found]


def pairs(cos: Merged, sin: Merged, turned: Numbers, at: Term) -> tuple[int, int, bool]:
    """(dims, first, interleaved) where every channel turns with its partner, all heads alike."""
    heads, width = turned.shape
    where = np.flatnonzero(turned[0])
    if not (turned == turned[0]).all() or not len(where) or len(where) % 2 or where[-1] - where[0] != len(where) - 1:
        raise NotRead("the channels that turn are not neighbours, or differ between heads", at.node)
    start, dims = int(where[0]), len(where)
    of, partner = cos.number.reshape(heads, width), sin.number.reshape(heads, width)
    sign = np.sign(sin.factor).reshape(heads, width) * np.sign(cos.factor).reshape(heads, width)
    for interleaved in (False, True):
        local = np.arange(dims)
        other = local ^ 1 if interleaved else (local + dims // 2) % dims
        lower = local % 2 == 0 if interleaved else local < dims // 2
        fits = np.array_equal(partner[:, where], of[:, where][:, other])
        if fits and (sign[:, where] == np.where(lower, -1, 1)).all():
            return dims, start, interleaved
    raise NotRead("channels do not turn in pairs, neither halves nor neighbours", at.node)


def frequencies(cos: Merged, sin: Merged, at: Term) -> tuple[Numbers, Operand | None]:
    """The frequency of every channel and the positions that all angles share."""
    table = np.zeros(len(sin.mask))
    for mask, angle in sin.angles:
        table[mask] = angle.frequency[mask]
    if not all(angle.is_of(table, mask) for mask, angle in cos.angles):
        raise NotRead("cosines and sines are of different angles", at.node)
    sources = [angle.positions for _, angle in (*cos.angles, *sin.angles)]
    if len({None if s is None else s.value for s in sources}) != 1:
        raise NotRead("angles are of different positions", at.node)
    return table, sources[0]


def base_of(frequency: Tensor, dims: int) -> float | None:
    """The base of which the frequencies are base^(-2i / dims), to the precision of float32."""
    if len(frequency) < 2 or abs(float(frequency[0]) - 1.0) > 2e-6 or not 0 < float(frequency[-1]) < 1:
        return None
    last = len(frequency) - 1
    raw = float(frequency[-1]) ** (-dims / (2 * last))
    exponent = torch.arange(0, dims, 2, dtype=torch.float64) / dims
    for base in (float(round(raw)), float(f"{raw:.4g}"), raw):
        # float32 rounds the exponent, the power and the reciprocal: a relative error of 1e-6 at most for any base in use
        if torch.allclose(base**-exponent, frequency.to(torch.float64), rtol=2e-6, atol=0):
            return base
    return None


def gathered(walk: Walk, holders: list[Term], source: Numbers) -> Term:
    """One term that reads what the holders read, each for its own channels."""
    first = holders[0]
    by_dim: list[Numbers | None] = []
    for dim in range(len(first.layout)):
        known = [walk.coordinate(term, dim) for term in holders]
        if any(k is None for k in known):
            by_dim.append(None)
            continue
        numbers = np.zeros(len(source), dtype=np.int64)
        for term, own in zip(holders, known, strict=True):
            fits = term.mask & (walk.channel(term)[0] == source)
            numbers[fits] = own[fits]  # type: ignore[index]
        by_dim.append(numbers)
    result = Term(first.value, first.layout, first.index, np.ones(len(source), dtype=bool))
    for dim, found in enumerate(by_dim):
        if found is not None and walk.space.resolve_group(first.layout[dim]):
            result = walk.placed(result, first.value, dim, found)
    return result
