"""Pages for a live model, under the budget that its rewrites are under too: where a step on a long cache is faster with them.

    pass quest, shapes="decode:16384"   ->   choices of pages, fewest keys first   ->   the first that is faster and holds the budget

A graph traced on a prompt has no cache, so the pass has no site there. Each choice is timed on a cache as long as is asked for, whole step
against whole step on the same cache read whole. What is faster is judged on the live model (`page_loss`). One half of the data chooses, on
the other the 95 % bound of the loss of pages and rewrites together is within the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.analysis.calibration import LEAST, Calibration
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.layer_attention import SHORT, LayerAttention
from attnopt.ir.clause import Clause
from attnopt.passes import Pass
from attnopt.passes.edits.caches.pages import Pages
from attnopt.passes.sparsify.quest import Quest
from attnopt.plan.judge.budget import Budget
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.evicting import judged
from attnopt.plan.live.generating import Used
from attnopt.plan.live.layers import FASTER
from attnopt.plan.live.page_loss import longer, on_prompts, weighed
from attnopt.plan.live.pages import PagesChooser
from attnopt.plan.live.steps import LONG, UNTIMED, step_times

ASK = f'shapes="decode:16384" asks for one, and caches from {LONG} tokens on are long'


def is_page_pass(given: Pass) -> bool:
    return isinstance(given, Quest)


def choices(passes: Sequence[Pass]) -> list[Pages]:
    """What these passes may choose, fewest keys first, and heads that choose together before those that do so apart."""
    asked = [p for p in passes if isinstance(p, Quest)]
    found = [Pages(p.size, max(3, n // p.size), together) for p in asked for n in p.budgets for together in (True, False)]
    return sorted(found, key=lambda pages: (pages.keys, not pages.together))


@dataclass(frozen=True)
class Paging:
    """model: with its rewrites; original: before them. batch, length: of the longest cache that steps are asked for on."""

    model: Any
    original: Any
    data: Calibration
    budget: Budget
    chooser: PagesChooser
    batch: int
    length: int
    seed: int = 0
    minimise: str = "time"

    def taken(self, passes: Sequence[Pass]) -> tuple[str | None, list[str]]:
        """The choice of pages that is taken, or None, and what the report says of it."""
        if self.minimise != "time":
            return None, ["quest: it saves time, and adds bounds of pages to a cache"]
        if not self.length:
            return None, [f"quest: no step on a long cache is asked for; {ASK}"]
        if not judged(self.budget):
            return None, [f"quest: its loss is a KL of the next token, and the budget is in {self.budget.metric}"]
        said: list[str] = []
        for pages in choices(passes):
            fits, line = self.tried(pages)
            if fits:
                return pages.clause, [line, *dict.fromkeys(said)]
            said.append(line)
        return None, ["every query reads the whole cache", *dict.fromkeys(said)]

    def tried(self, pages: Pages) -> tuple[bool, str]:
        """Whether a choice of pages is taken, and why."""
        words, keys = pages.clause, pages.keys
        clause = page_choice(words)
        assert clause is not None
        if keys >= self.length or SHORT * keys > self.length:
            return False, f"{words}: a cache of {self.length} tokens, not {SHORT} times what a query reads, is read whole"
        choosing, holding = (longer(half, keys) for half in self.data.split(self.seed))
        if (count := min(len(choosing), len(holding))) < LEAST:
            return False, (
                f"quest: what other pages hold is weighed on texts of more than the {keys} tokens that a query reads, and a half of the "
                f"data has {count} of {LEAST} that are needed; give longer calibration batches (of texts the beginning alone is read)"
            )
        model = shared_copy(self.model)
        try:
            self.chooser(model, clause)
            layers = {**self.chooser.idle, **held_by(model)}
            fast, measured = self.timed(layers, model, clause)
            if not fast:
                return False, f"{words}: {measured}"
            found = {path: held.on_pages for path, held in layers.items() if held.on_pages is not None}
            chooses = on_prompts(model, layers, found, windows=self.chooser.windows)
            loss = weighed(chooses, self.original, choosing, clause, self.seed)
            if loss.upper > self.budget.allowed:
                return False, f"{words}: {measured}, and loses at most {loss.upper:.3g}, over the budget"
            held = weighed(chooses, self.original, holding, clause, self.seed)
            if held.upper > self.budget.allowed:
                return False, f"{words}: {measured}, and loses at most {held.upper:.3g} on the texts held back, over the budget"
            whole = weighed(self.model, self.original, holding, clause, self.seed)
        except AttnoptError as failure:
            return False, f"{words}: {failure.message}"
        longest = max(len(row) for row in holding)
        return True, (
            f"one query reads {words} of a cache: {measured}; with the rewrites {held}, without pages {whole.mean:.3g} (behind the first "
            f"{keys} tokens of texts of up to {longest}; longer caches were not judged)"
        )

    def timed(self, layers: Mapping[str, LayerAttention], model: Any, clause: Clause) -> tuple[bool, str]:
        """Whether a step gains enough by choosing, and what was measured."""
        used = {"plain": Used(self.model, live=True), "pages": Used(model, pages=clause)}
        times = step_times(layers, used, self.batch, self.length)
        if times is None:
            return False, UNTIMED
        ratio = times["pages"].ratio(times["plain"])
        return ratio <= FASTER, f"a step takes {ratio:.2f} of its time on {self.length} tokens"
