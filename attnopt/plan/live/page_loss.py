"""What a live model loses where each query reads the pages that it chooses, on texts longer than what it reads.

    a text [L] read at once, every query under pages(16, 64, recent=1) as if it were the newest   ->   KL behind its first 1,024 tokens

So each position loses what it would lose at the end of a generation of that length, and rests on keys that were computed alike. Prompts
are computed whole in use: what is judged is no less than what is lost. Positions that have no more keys than a query reads lose nothing,
and are not counted.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.calibration import Calibration
from attnopt.errors import AttnoptError
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.layer_attention import LayerAttention, OnPages, keys_read
from attnopt.ir.clause import Clause
from attnopt.plan.judge.quality import Loss, kl
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.converting import attach
from attnopt.selectors.pages import seen

METRIC = "mean KL"
ROWS = 256  # queries whose scores are there at once


@dataclass
class PagesOfPrompt:
    """The attention of a prompt whose queries choose pages, in plain torch. calls: how often it was asked."""

    clause: Clause
    scaling: float
    softcap: float | None = None
    calls: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        """q [B, H, L, D], k [B, G, L, D], v [B, G, L, E] -> ([B, H, L, E],)."""
        self.calls += 1
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        made = []
        for first in range(0, q.shape[2], ROWS):
            rows = q[:, :, first : first + ROWS]
            last = first + rows.shape[2]
            scores = self.scaling * rows @ keys[:, :, :last].mT
            if self.softcap is not None:
                scores = self.softcap * (scores / self.softcap).tanh()
            shown = seen(self.clause, rows, k[:, :, :last], first)
            made.append(scores.masked_fill(~shown, -torch.inf).softmax(-1) @ values[:, :, :last])
        return (torch.cat(made, 2),)


def longer(data: Calibration, keys: int) -> list[Tensor]:
    """Token ids [L] of the texts of more than so many tokens, without padding."""
    rows = [row[mask.bool()] for b in data.batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    return [row for row in rows if len(row) > keys]


def on_prompts(model: Any, layers: Mapping[str, LayerAttention], found: Mapping[str, OnPages], *, windows: bool) -> Any:
    """A copy of a live model whose layers choose pages for each query of a prompt. layers, found: by path; windows: as in `attach`."""
    made = shared_copy(model)
    chosen = {path: each for path, each in found.items() if each.run is not None}
    there = held_by(made)
    attach(made, {path: layers[path] for path in chosen if path not in there}, windows=windows)
    for path, each in chosen.items():
        held: LayerAttention = getattr(made.get_submodule(path), HELD)
        judged = PagesOfPrompt(each.clause, held.call.scaling, held.call.softcap)
        setattr(made.get_submodule(path), HELD, replace(held, prefill=judged))
    return made


@torch.no_grad()
def weighed(model: Any, original: Any, rows: Sequence[Tensor], clause: Clause, seed: int) -> Loss:
    """model: as `on_prompts` makes it, or one that reads all. rows: as `longer` gives them.

    Raises AttnoptError where a layer of `on_prompts` was not asked to choose.
    """
    device, first, losses = next(model.parameters()).device, keys_read(clause), []
    judges = [held.prefill for held in held_by(model).values() if isinstance(held.prefill, PagesOfPrompt)]
    for row in rows:
        ids = row[None].to(device)
        before, after = (each(ids, use_cache=False).logits[0, first:] for each in (original, model))
        losses.append(kl(before, after))
    if any(judge.calls < len(rows) for judge in judges):
        raise AttnoptError(
            "a layer computes prompts in its own way, so that nothing tells what it loses by pages",
            next_move="Optimise the model in the dtype and on the device that it is used in.",
        )
    return Loss.of(METRIC, losses, seed)
