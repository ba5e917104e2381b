"""What one query does on a live cache with bounds of its pages: the kernel that chooses pages by them and reads no others.

    softmax scale(0.125), pages(16, 64, recent=1)   ->   OnPages(…, "tvm-pages") for all layers but the first two

Which pages are read is what the layer computes, so a layer that can, does; whether a step gains by it is for `paging` to say. Layers that
cannot read all that they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.tvm.lowerings.tvm_pages import TvmPages
from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.layer_attention import LayerAttention, OnPages
from attnopt.ir.at_end import AT_END
from attnopt.ir.clause import Clause
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.passes.edits.caches.pages import BOUNDS
from attnopt.passes.sparsify.quest import Quest
from attnopt.plan.live.codes import form_of, give, held_by, reported
from attnopt.plan.live.layers import one_query

SAID = "live, decode on pages"


@dataclass(frozen=True)
class Run:
    """The operator that chooses and reads pages. line: the spec."""

    line: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
        made: Tensor = torch.ops.attnopt.tvm_pages.default(q, k, v, [low, high], self.line)
        return made


@dataclass(frozen=True)
class PagesChooser:
    """idle: layers that hold no kernel, by path. windows: as in `attach`, where one of them gets one. dense: first layers that read all."""

    idle: Mapping[str, LayerAttention] = field(default_factory=dict)
    windows: bool = False
    dense: int = Quest.dense

    def __call__(self, model: Any, clause: Clause) -> list[str]:
        """Let the layers of a live model choose pages; what a report says of it, which stands in the model's then.

        Raises InputMismatch where none can.
        """
        layers = {**self.idle, **held_by(model)}
        found = self.choose(model, layers, clause)
        if not any(each.run for each in found.values()):
            why = "; ".join(dict.fromkeys(each.why for each in found.values())) or "no layer was recognised"
            raise InputMismatch(f"no layer can choose pages: {why}", where=str(clause), next_move="Leave cache_pages as None.")
        give(model, layers, found, windows=self.windows, field="on_pages")
        return reported(model, lines(found), SAID)

    def planned(self, model: Any, words: str | None) -> tuple[Clause | None, list[str]]:
        """The choice of a plan, which the layers have then, and what a report says; None where none can choose, or nothing is asked."""
        clause = page_choice(words)
        try:
            return clause, [] if clause is None else self(model, clause)
        except InputMismatch as failure:
            return None, [f"every query reads the whole cache: {failure.message}"]

    def choose(self, model: Any, layers: Mapping[str, LayerAttention], clause: Clause) -> dict[str, OnPages]:
        """For each layer, in the order of the model."""
        ordered = sorted(layers, key=lambda path: model.get_submodule(path).layer_idx)
        return {path: self.of_layer(at, layers[path], clause) for at, path in enumerate(ordered)}

    def of_layer(self, at: int, held: LayerAttention, clause: Clause) -> OnPages:
        why = f"the first {self.dense} read all, as in the source" if at < self.dense else unfit(held, clause)
        return OnPages(clause, why=why) if why else OnPages(clause, TvmPages().name, Run(str(spec_of(held, clause))))


def restored(layers: Mapping[str, LayerAttention], clause: Clause, saved: Mapping[str, Sequence[str]]) -> dict[str, OnPages]:
    """What layers did when they were saved: the name of a kernel, and why, by path."""
    return {
        path: OnPages(clause, name, Run(str(spec_of(layers[path], clause)))) if name else OnPages(clause, why=why)
        for path, (name, why) in saved.items()
    }


def unfit(held: LayerAttention, clause: Clause) -> str:
    """Why a layer cannot choose pages of its cache; empty where it can."""
    if held.narrowed:
        return "a plan hides keys by their positions, which pages in a table do not have"
    if held.call.window is not None:
        return "a layer with a window keeps its own cache"
    if held.device != "cpu":
        return "the kernel that reads pages of a live cache runs on a CPU"
    if held.call.key_heads != held.call.value_heads:
        return "its keys and values have not as many heads"
    refused = TvmPages().refusal(spec_of(held, clause), form_of(held))
    return "" if refused is None else refused.reason


def spec_of(held: LayerAttention, clause: Clause) -> AttentionSpec:
    """Of one query, with the bounds of its pages as operands."""
    choice = replace(clause, options=(*clause.options, *BOUNDS.items()))
    return one_query(parse(held.spec), False).with_(selection=choice, offset=AT_END)


def lines(found: Mapping[str, OnPages]) -> list[str]:
    """What a report says."""
    counted = Counter((each.name, str(each.clause), each.why) for each in found.values())
    return [
        f"{SAID}: {name} in {n} layers, {words}" if name else f"{SAID}: all keys are read in {n} layers ({why})"
        for (name, words, why), n in counted.items()
    ]
