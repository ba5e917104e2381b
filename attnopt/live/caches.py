"""How a live model keeps its cache: a policy that forgets, codes, or pages that a query chooses, of which at most one is taken.

    passes and policies that were asked for   ->   Wishes          a model with its rewrites, and these   ->   Kept, and why

A trace of a prompt has no cache, so these are judged on the live model itself, after its weights are rewritten in half of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from attnopt.asked import Asked, Checked
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.model import read_whole
from attnopt.ir.by_layer import CacheForm
from attnopt.ir.clause import Clause
from attnopt.passes import Pass
from attnopt.passes.kvcache.eviction import BY_NAME
from attnopt.plan.live.codes import CodesChooser
from attnopt.plan.live.coding import coded, is_cache_pass
from attnopt.plan.live.converting import Live
from attnopt.plan.live.evicting import half_of, proposed
from attnopt.plan.live.pages import PagesChooser
from attnopt.plan.live.paging import Paging, is_page_pass
from attnopt.plan.live.steps import long_decode, timed_on
from attnopt.plan.live.text_layers import text_layers
from attnopt.plan.pipeline import Request


@dataclass(frozen=True)
class Wishes:
    """codes, quests: passes that store a cache in codes, and that read pages of it. batch, length: of the longest cache that steps are
    asked for on. by_name: whether the user named passes. checked: with policies, budget and plan."""

    checked: Checked
    codes: tuple[Pass, ...]
    quests: tuple[Pass, ...]
    batch: int
    length: int
    by_name: bool

    @classmethod
    def of(cls, asked: Asked, checked: Checked, request: Request) -> Wishes:
        batch, length = long_decode(checked.workload)
        judged = not checked.budget.exact and request.calibration is not None and checked.plan is None
        by_name, for_time = asked.passes is not None, request.minimise == "time"
        codes = [p for p in request.passes if is_cache_pass(p)] if judged and (by_name or not for_time or length > 0) else []
        quests = [p for p in request.passes if is_page_pass(p)] if judged and (by_name or (for_time and length > 0)) else []
        return cls(checked, tuple(codes), tuple(quests), batch, length, by_name)

    def rest(self, request: Request) -> Request:
        """What is asked of the weights, in half of the budget where caches get the other. Without a budget nothing is taken from it, so
        that what was named is told of."""
        if not self.checked.budget.exact:
            others = tuple(p for p in request.passes if p not in self.codes and not is_page_pass(p))
            request = replace(request, passes=others)
        halved = self.checked.policies or self.codes or (self.quests and self.length)
        return replace(request, budget=half_of(request.budget)) if halved else request

    @property
    def planned_pages(self) -> str:
        return self.checked.plan.cache_pages if self.checked.plan is not None else ""

    @property
    def known(self) -> bool:
        """Whether it must be known what each layer computes, also where no kernel is worth it."""
        return bool(self.planned_pages or (self.quests and self.length))


@dataclass
class Kept:
    """What was taken. words: of codes, as a cache is set to them. judged: whether something was measured against the whole budget."""

    policy: ChosenPolicy | None
    words: str
    choice: Clause | None
    on_codes: CodesChooser
    on_pages: PagesChooser
    notes: list[str] = field(default_factory=list)
    judged: bool = False

    @property
    def form(self) -> CacheForm | None:
        return live_form(self.words or None)

    @property
    def stored(self) -> CacheForm | None:
        """How tokens are stored, by the model or by its policy."""
        return self.form if self.form is not None or self.policy is None else self.policy.clause

    @property
    def any(self) -> bool:
        return self.policy is not None or self.form is not None or self.choice is not None


def kept(host: ModuleHost, original: Any, made: Live, request: Request, wishes: Wishes) -> Kept:
    """original: the model before its rewrites, against which losses count. Layers get their kernels for what is taken."""
    found = Kept(
        None,
        wishes.checked.plan.cache_codes if wishes.checked.plan is not None else "",
        None,
        CodesChooser(request.select, idle=made.idle, windows=made.windows),
        PagesChooser(idle=made.idle, windows=made.windows),
    )
    forgetting(found, original, made, request, wishes)
    on_choice = in_pages(found, original, made, request, wishes)
    in_codes(found, host, original, made, request, wishes)
    if found.words and found.choice is not None:
        found.notes.append(f"no {found.choice} beside a cache in codes, with which a step is faster")
        found.choice, on_choice = None, []
        read_whole(made.model)
    found.notes += on_choice
    return found


def forgetting(found: Kept, original: Any, made: Live, request: Request, wishes: Wishes) -> None:
    checked = wishes.checked
    if checked.policies and any(held.narrowed for held in made.layers.values()):
        found.notes.append(
            "no cache policy: a plan that narrows what layers see is not held beside one; name passes without such masks"
        )
    elif checked.policies and request.calibration is not None:
        found.policy, said = proposed(
            made.model, original, request.calibration, checked.budget, checked.policies,
            minimise=request.minimise, seed=request.seed,
        )  # fmt: skip
        found.notes += said
        found.judged = True
    elif checked.plan is not None and checked.plan.cache_policy:
        found.policy = ChosenPolicy.from_json(checked.plan.cache_policy, BY_NAME)
        found.notes.append(f"cache policy {found.policy}: as the plan says")


def in_pages(found: Kept, original: Any, made: Live, request: Request, wishes: Wishes) -> list[str]:
    """What is said of the layers that choose pages, which counts where the choice stays."""
    words = wishes.planned_pages
    if wishes.quests and found.policy is not None:
        found.notes.append(f"no pages beside {found.policy}: what a policy keeps is read whole")
    elif wishes.quests and request.calibration is not None:
        paging = Paging(
            made.model, original, request.calibration, wishes.checked.budget, found.on_pages, wishes.batch, wishes.length,
            request.seed, request.minimise,
        )  # fmt: skip
        chosen, said = paging.taken(wishes.quests)
        words, found.judged = chosen or "", True
        found.notes += said
    found.choice, on_choice = found.on_pages.planned(made.model, words or None)
    return on_choice


def in_codes(found: Kept, host: ModuleHost, original: Any, made: Live, request: Request, wishes: Wishes) -> None:
    if not wishes.codes:
        return
    if found.choice is not None and wishes.by_name:
        found.notes.append(f"no cache in codes beside {found.choice}: the kernel of pages reads numbers; name one of both")
    elif found.policy is not None:
        found.notes.append(f"no cache in codes beside {found.policy}, which has its own storage")
    elif request.calibration is not None:
        by_time = not wishes.by_name and request.minimise == "time"
        timed = timed_on(made.model, found.on_codes, wishes.batch, wishes.length, found.choice) if by_time else None
        texts, seed = request.calibration, request.seed
        chosen, said = coded(
            made.model, original, texts, wishes.checked.budget, wishes.codes, seed, timed, text_layers(host, texts, seed)
        )
        found.words, found.judged = chosen or "", True
        found.notes += said
