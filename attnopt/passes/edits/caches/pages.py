"""Pages of a cache as state of the graph of one decoding step, and the attention of the few pages that a query chooses by them.

    present = concat(past, new), attention(q, present, …)
        ->   low, high [B, G, ceil(T / 16), D] = the smallest and largest channels of the keys of each page, with the new key in the last
             bound = relu(q) . high - relu(-q) . low          >= q . k of every key of the page
             pages = the n of the largest bound, the newest among them;  attention(q, keys and values of these pages alone)

low and high come in and go out beside the keys; a step reads them, and of keys and values no more than n pages. The reference of the same
choice is `pages(16, n, recent=1)` of a spec: the sites that come back say so, for kernels that read pages where they lie. Where there
are fewer than n pages, places are left over, whose keys nobody sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.ir.at_end import AT_END, beyond_softmax, reads_positions
from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape, product, symbol
from attnopt.ir.expr import Const, Index, Load
from attnopt.ir.graph import Value
from attnopt.ir.layout import Axis
from attnopt.ir.site import Builder, Operand, Refusal, Site, arrange
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.passes.candidate import Group
from attnopt.passes.edits.caches.nodes import Nodes
from attnopt.passes.edits.caches.slots import Slot
from attnopt.selectors.pooling import highest, lowest

SHOWN = "shown_keys"  # the operand that says which keys of the chosen pages there are
BOUNDS = {"low": "page_minima", "high": "page_maxima"}  # operands of a spec that chooses by them
LARGE = 3.0e38


@dataclass(frozen=True)
class Pages:
    """size: keys of a page. count: pages that a query sees. together: query heads that share keys choose by their largest bound."""

    size: int = 16
    count: int = 64
    together: bool = False

    @property
    def clause(self) -> str:
        """The selection in the words of a spec."""
        return f"pages({self.size}, {self.count}, recent=1{', group=max' if self.together else ''})"

    @property
    def keys(self) -> int:
        """How many a query sees at most."""
        return self.size * self.count

    def of(self, length: Dim) -> Dim:
        """How many pages so many keys begin."""
        return -(-length // self.size) if isinstance(length, int) else symbol(f"(({length} + {self.size - 1})//{self.size})")

    def parts(self, slot: Slot) -> list[tuple[str, Shape, str]]:
        batch, heads, length, width = slot.past.shape  # type: ignore[misc]
        bounds = (batch, heads, self.of(length), width)
        return [
            ("keys", (batch, heads, length, width), slot.past.dtype),
            *((w, bounds, slot.past.dtype) for w in ("low", "high")),
        ]

    def packed(self, x: Tensor) -> list[Tensor]:
        """What past keys [B, G, P, D] are as state."""
        return [x, *((x, x) if not x.shape[2] else (lowest(x, self.size), highest(x, self.size)))]


def unfit(site: Site, k: Slot, v: Slot) -> Refusal | None:
    """Why this attention cannot read some pages of its cache as if there were no others."""
    spec = site.spec
    if (k.new.shape or ())[2:3] != (1,):
        return Refusal("pages are chosen by one query, and this graph takes any number of new tokens", site.name)
    if reads_positions(spec):
        return Refusal(f"the mask {spec.mask} reads positions, which keys in pages do not have", site.name)
    if odd := beyond_softmax(spec, ("offset",)):
        return Refusal(f"bounds are of scaled products under a softmax, and this attention has {odd}", site.name)
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read", site.weights_used)
    return None


def keep_pages(group: Group, chosen: Sequence[tuple[Slot, Slot, Pages]]) -> Group:
    """Edits the host of the group in place; give it a copy, and finish it."""
    host = group.host
    outputs: dict[Value, list[tuple[str, Value]]] = {}
    replaced: dict[Value, Value] = {}
    made: dict[str, Site] = {}
    for k, v, pages in chosen:
        keys, low, high = host.split_input(k.past, pages.parts(k), pages.packed)
        assert k.present.producer is not None and k.site.output.value.producer is not None
        n = Nodes(host.builder(k.present.producer))
        length = k.present.shape[2]  # type: ignore[index]
        present = n.joined([keys, n.cast(k.new, keys.dtype)], 2, length)
        state = extended(n, pages, {"low": low, "high": high}, n.cast(k.new, keys.dtype), length)
        outputs[k.present] = [("keys", present), *state.items()]
        replaced[k.present] = present
        end = host.builder(k.site.output.value.producer)
        output = attended(group, k.site, end, pages, present, v.present, state)
        replaced[k.site.output.value] = output
        made[k.site.name] = of_cache(k.site, pages, present, v.present, state, output)
    host.split_outputs(outputs)
    for old, new in replaced.items():
        host.replace(old, new)
    return replace(group, sites=tuple(made.get(site.name, site) for site in group.sites))


def of_cache(site: Site, pages: Pages, keys: Value, values: Value, state: Mapping[str, Value], output: Value) -> Site:
    """The site as one that chooses pages of its cache, its state in operands."""
    a = site.axes
    selection = parse(f"softmax {pages.clause}").selection
    assert selection is not None
    bounds = Axis("pages", pages.of(site.size("k")))
    return replace(
        site, spec=site.spec.with_(selection=replace(selection, options=(*selection.options, *BOUNDS.items())), offset=AT_END),
        k=Operand(keys, (a["b"], a["g"], a["k"], a["d"])), v=Operand(values, (a["b"], a["g"], a["k"], a["e"])),
        operands={name: Operand(state[word], (a["b"], a["g"], (bounds,), a["d"])) for word, name in BOUNDS.items()},
        output=Operand(output, site.output.layout), tensor_form=None, steps=(*site.steps, "quest"),
    )  # fmt: skip


def first_keys(n: Nodes, pages: Pages, length: Dim) -> Value:
    """The number of the first key of each page of T keys, int64 [P]: every 16th of T places begins a page."""
    return n.cut(n.places(length), 0, 0, None, pages.of(length), pages.size)


def extended(n: Nodes, pages: Pages, past: Mapping[str, Value], new: Value, length: Dim) -> dict[str, Value]:
    """low and high with a new key [B, G, 1, D] in the last page, which it may be the first of."""
    number = (first_keys(n, pages, length).shape or ())[0]  # what a slice goes up to must be the size of something
    made = {}
    for word, op in (("low", "minimum"), ("high", "maximum")):
        count = (past[word].shape or ())[2]
        room = n.joined([past[word], new], 2, count + 1 if isinstance(count, int) else symbol(f"{count} + 1"))
        there = n.cut(room, 2, 0, number, number)
        full = n.cut(there, 2, 0, -1, number - 1 if isinstance(number, int) else symbol(f"{number} - 1"))
        made[word] = n.joined([full, n.binary(op, n.cut(there, 2, -1, None, 1), new)], 2, number)
    return made


def attended(
    group: Group, site: Site, builder: Builder, pages: Pages, keys: Value, values: Value, state: Mapping[str, Value]
) -> Value:
    """The output of the site from the pages that its query chooses."""
    assert group.attend is not None
    a, n, length = site.axes, Nodes(builder), keys.shape[2]  # type: ignore[index]
    batch, heads, rest = site.size("b"), site.size("g"), product(axis.size for axis in a["r"])
    assert isinstance(heads, int) and isinstance(rest, int)
    q = arrange(builder, site.q, [a["b"], a["g"], (*a["r"], *a["q"]), a["d"]])
    chosen = choice(n, pages, q, state, length)  # [B, G, R, n]
    tables = 1 if pages.together else rest
    place = n.builder.constant(torch.arange(pages.size), "int64")
    rows = n.add(n.reshaped(n.mul(chosen, pages.size), batch, heads, tables, pages.count, 1), place)
    rows = n.reshaped(rows, batch, heads, tables * pages.keys)
    there = n.binary("lt", rows, n.size(length))
    rows = n.binary("minimum", rows, n.sub(n.size(length), 1))
    seen = Axis("pages", pages.keys)
    apart = () if pages.together else a["r"]
    axes = {**a, "k": (seen,)} | ({} if pages.together else {"g": (*a["g"], *a["r"]), "r": ()})
    held = (a["b"], a["g"], *([apart] if apart else []), (seen,))
    shape: Shape = (batch, heads, *([rest] if apart else []), pages.keys)
    gathered = {}
    for side, whole, width in (("k", keys, "d"), ("v", values, "e")):
        found = of_rows(n, whole, rows)
        channels = (found.shape or ())[3]
        gathered[side] = Operand(n.reshaped(found, *shape, channels), (*held, a[width]))
    mask = Operand(n.reshaped(there, batch, heads * tables, 1, pages.keys), (a["b"], (*a["g"], *apart), (), (seen,)))
    spec = spec_of(site, pages)
    made = replace(
        site, spec=spec, axes=axes, k=gathered["k"], v=gathered["v"], operands={SHOWN: mask}, tensor_form=None, steps=(*site.steps, "quest")
    )  # fmt: skip
    return group.attend(made, builder)


def spec_of(site: Site, pages: Pages) -> AttentionSpec:
    """What is computed of the keys that were gathered."""
    mask = Load(SHOWN, (Index("b"), Index("h"), Const(0), Index("k")))
    made = site.spec.with_(mask=mask, offset=None)
    heads = site.size("h")
    return made if pages.together or site.spec.heads is None else made.with_(heads=Clause("heads", (heads,)))  # type: ignore[arg-type]


def choice(n: Nodes, pages: Pages, q: Value, state: Mapping[str, Value], length: Dim) -> Value:
    """The pages of the largest bounds for q [B, G, R, D]: int64 [B, G, R, n], or [B, G, 1, n] where heads choose together."""
    low, high = (n.permuted(state[word], 0, 1, 3, 2) for word in ("low", "high"))
    up, down = n.unary("relu", q), n.unary("relu", n.unary("neg", q))
    bound = n.cast(n.sub(n.matmul(up, high), n.matmul(down, low)), "float32")
    if pages.together:
        bound = n.reduced("max", bound, 2)
    count = pages.of(length)
    batch, heads, rows = (bound.shape or ())[:3]
    newest, left = (n.builder.emit("full", shape=(batch, heads, rows, many), dtype="float32", value=value)
                    for many, value in ((1, LARGE), (pages.count, -LARGE)))  # fmt: skip
    before, more = (count - 1, count + pages.count) if isinstance(count, int) else (
        symbol(f"{count} - 1"), symbol(f"{count} + {pages.count}")
    )  # fmt: skip
    ranked = n.joined([n.cut(bound, 3, 0, -1, before), newest, left], 3, more)
    return n.builder.emit("topk", ranked, shape=(batch, heads, rows, pages.count), dtype="int64", count=pages.count)


def of_rows(n: Nodes, x: Value, rows: Value) -> Value:
    """The rows [B, G, S] of x [B, G, T, D]."""
    batch, heads, count = rows.shape or ()
    each = [n.reshaped(n.places(batch), batch, 1, 1), n.reshaped(n.places(heads), 1, heads, 1), rows]
    return n.builder.emit("index", x, *each, shape=(batch, heads, count, (x.shape or ())[3]), dtype=x.dtype, axes=(0, 1, 2))
