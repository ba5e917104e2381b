"""Rotations in other spellings are one rotation; what is nearly one is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from spelling import B, L, Recorder

from attnopt.ir.block import Scale
from attnopt.ir.clause import Clause
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

H, D = 4, 8
FREQUENCY = 10000.0 ** (-torch.arange(0, D, 2) / D)


class Turning:
    """One layer whose queries and keys turn; each method is a spelling of the rotation."""

    def __init__(self, frequency=FREQUENCY) -> None:
        self.r = r = Recorder()
        self.x = r.input("x", B, L, H * D)
        positions = r.unary("cast", r.reshape(r.node("iota", shape=(L,), dtype="int64", start=0, step=1), 1, L, 1), "float32")
        self.angle = r.binary("mul", positions, r.constant(frequency.reshape(1, 1, -1)))

    def heads(self):
        return self.r.permute(self.r.reshape(self.r.linear(self.x, H * D), B, L, H, D), 0, 2, 1, 3)

    def table(self, wave, angle=None):
        made = self.r.unary(wave, self.angle if angle is None else angle)
        return self.r.reshape(made, 1, 1, L, made.shape[-1])

    def part(self, x, start, stop, step=1):
        size = -(-(stop - start) // step)
        return self.r.node("slice", x, shape=(*x.shape[:-1], size), axis=len(x.shape) - 1, start=start, stop=stop, step=step)

    def join(self, *parts):
        total = sum(p.shape[-1] for p in parts)
        return self.r.node("concat", *parts, shape=(*parts[0].shape[:-1], total), axis=len(parts[0].shape) - 1)

    def halves(self, x):
        """cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)."""
        r, cos, sin = self.r, self.table("cos"), self.table("sin")
        a, b = self.part(x, 0, D // 2), self.part(x, D // 2, D)
        low = r.binary("sub", r.binary("mul", a, cos), r.binary("mul", b, sin))
        return self.join(low, r.binary("add", r.binary("mul", b, cos), r.binary("mul", a, sin)))

    def whole(self, x, order=(1, 0), sign="second", wave="sin"):
        """x * cos + cat(-x2, x1) * sin."""
        r, doubled = self.r, self.join(self.angle, self.angle)
        parts = [self.part(x, 0, D // 2), self.part(x, D // 2, D)]
        swapped = [parts[i] for i in order]
        swapped[0] = r.unary("neg", swapped[0]) if sign == "second" else swapped[0]
        mixed = r.binary("mul", self.join(*swapped), self.table(wave, doubled))
        return r.binary("add", mixed, r.binary("mul", x, self.table("cos", doubled)))

    def neighbours(self, x):
        """Even and odd channels, stacked again."""
        r, cos, sin = self.r, self.table("cos"), self.table("sin")
        a, b = self.part(x, 0, D, 2), self.part(x, 1, D, 2)
        low = r.binary("sub", r.binary("mul", a, cos), r.binary("mul", b, sin))
        high = r.binary("add", r.binary("mul", b, cos), r.binary("mul", a, sin))
        apart = [r.reshape(t, *t.shape, 1) for t in (low, high)]
        stacked = r.node("concat", *apart, shape=(*low.shape, 2), axis=4)
        return r.reshape(stacked, *x.shape)

    def block(self, turn):
        r = self.r
        q, k, v = turn(self.heads()), turn(self.heads()), self.heads()
        out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)
        r.output(r.binary("add", r.linear(r.reshape(r.permute(out, 0, 2, 1, 3), B, L, H * D), H * D), self.x))
        (site,) = recognise(r.graph).sites
        return find_block(r.graph, site)


@pytest.mark.parametrize(("spelling", "interleaved"), [("halves", False), ("whole", False), ("neighbours", True)])
def test_spellings_of_one_rotation(spelling, interleaved):
    layer = Turning()
    block = layer.block(getattr(layer, spelling))
    assert not block.missing
    assert (block.rotary.dims, block.rotary.first, block.rotary.interleaved) == (D, 0, interleaved)
    assert torch.equal(block.rotary.inv_freq, FREQUENCY)
    assert block.rotary.positions.value.producer.op == "iota"
    pairs = (("pairs", "interleaved"),) if interleaved else ()
    assert block.rotary.clause == Clause("rotary", (D,), pairs)


def test_part_of_the_channels():
    layer = Turning(frequency=FREQUENCY[:2])

    def turn(x):
        r, inner, cos, sin = layer.r, layer.part(x, 2, 6), layer.table("cos"), layer.table("sin")
        a, b = layer.part(inner, 0, 2), layer.part(inner, 2, 4)
        low = r.binary("sub", r.binary("mul", a, cos), r.binary("mul", b, sin))
        high = r.binary("add", r.binary("mul", b, cos), r.binary("mul", a, sin))
        return layer.join(layer.part(x, 0, 2), low, high, layer.part(x, 6, 8))

    block = layer.block(turn)
    assert (block.rotary.dims, block.rotary.first, block.rotary.base) == (4, 2, 100.0)


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 8e6, None])
def test_bases_are_proved(base):
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D) * torch.tensor([1.0, 1.0, 0.99, 1.0])
    if base is not None:
        frequency = 1.0 / (base ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D))
    layer = Turning(frequency=frequency)
    block = layer.block(layer.halves)
    assert block.rotary.base == base
    assert torch.equal(block.rotary.inv_freq, frequency)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"sign": "none"}, "channels do not turn in pairs, neither halves nor neighbours"),
        ({"order": (0, 1)}, "channels do not turn in pairs, neither halves nor neighbours"),
        ({"wave": "cos"}, "a channel is added up from more than two others"),
        ({"wave": "exp"}, "'exp' is no table of cosines or sines"),
    ],
)
def test_near_rotations_are_refused(wrong, reason):
    layer = Turning()
    block = layer.block(lambda x: layer.whole(x, **wrong))
    assert block.rotary is None and block.q is None
    assert block.v is not None
    assert [m.reason for m in block.missing if "queries" in m.reason] == [f"projection of queries not found: {reason}"]


def test_a_factor_is_a_step_of_its_own():
    layer = Turning()
    factors = iter((0.25, 1.0))
    block = layer.block(lambda x: layer.halves(layer.r.binary("mul", x, next(factors))))
    assert not block.missing and block.rotary.on == ("q", "k") and block.rotary.scaling == 1.0
    assert [type(step).__name__ for step in block.streams["q"]] == ["Projection", "Rotary", "Scale"]
    assert block.part("q", Scale).factor == 0.25


def test_queries_that_turn_otherwise_than_keys():
    layer = Turning()
    turns = iter((layer.halves, layer.neighbours))
    block = layer.block(lambda x: next(turns)(x))
    assert block.rotary is None
    assert [m.reason for m in block.missing] == ["queries and keys turn differently"]


def test_angles_that_the_model_computes_are_refused():
    layer = Turning()
    layer.angle = layer.r.binary("mul", layer.angle, layer.r.input("stretch", 1, L, 1))
    block = layer.block(layer.halves)
    assert block.q is None
    assert "the frequencies are not constant" in block.missing[0].reason
