"""Options of a group: candidates alone and together, what excludes what, ties, and the same kind everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hosts.onnx import small_models

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, Group
from attnopt.passes.candidate import Per
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import classes_of, exclusions_of, kinds_of, moves_of, ties_of, uniform


@dataclass(frozen=True)
class Says:
    """Proposes candidates of these kinds, which change these things of a site; or of the whole model, removing the first site."""

    name: str
    kinds: tuple[str, ...]
    changes: tuple[str, ...] = ("mask",)
    per: Per = "site"
    tie: str = ""
    exact: bool = False
    cached: str = ""

    def propose(self, group, evidence):
        if not self.kinds:
            return Refusal("nothing to say", group.name)
        removes = group.sites[0].nodes if "structure" in self.changes else ()
        return [
            Candidate(
                self.name,
                False,
                k,
                kind=k,
                changes=self.changes,
                removes=removes,
                tie=self.tie and f"{self.tie} {k}",
                cached={s.name: self.cached for s in group.sites if self.cached},
            )
            for k in self.kinds
        ]

    def apply(self, candidate, group):
        return replace(group, sites=tuple(s.with_step(candidate.kind) for s in group.sites))


@pytest.fixture(scope="module")
def grouping():
    return Grouping(OnnxHost.from_model(small_models.two_layers()))


def kinds(option):
    return tuple(m.candidate.kind for m in option.moves)


def test_different_changes_are_offered_together(grouping):
    masks, caches = Says("masks", ("w64", "w16")), Says("caches", ("int8",), ("cache",))
    classes = classes_of(grouping, (masks, caches, Says("mute", ())), None)
    assert len(classes) == 2
    for each in classes:
        assert [kinds(o) for o in each.options] == [(), ("w64",), ("w16",), ("int8",), ("w64", "int8"), ("w16", "int8")]
        assert [str(r) for _, r in each.refusals] == [f"nothing to say (at {each.name})"]
    (pair,) = classes[0].options[4].specs()
    assert pair[1].steps == ("w64", "int8")
    assert kinds_of(classes)["masks: w64 + caches: int8"] == 2


def test_what_the_host_cannot_hold_is_not_offered(monkeypatch):
    def refuses(self, changes, sites, shapes):
        return Refusal("no caches here", sites[0].name) if "cache" in changes else None

    monkeypatch.setattr(OnnxHost, "refuses_change", refuses)
    there = Grouping(OnnxHost.from_model(small_models.two_layers()))
    first, _ = classes_of(there, (Says("masks", ("w64",)), Says("caches", ("int8",), ("cache",))), None)
    assert [kinds(o) for o in first.options] == [(), ("w64",)]
    assert [(name, refusal.reason) for name, refusal in first.refusals] == [("caches", "no caches here")]


def test_equal_changes_are_not(grouping):
    classes = classes_of(grouping, (Says("masks", ("w64",)), Says("others", ("global",))), None)
    assert [kinds(o) for o in classes[0].options] == [(), ("w64",), ("global",)]


def test_three_that_go_together_are_made_once(grouping):
    passes = [Says(c, (c,), (c,)) for c in ("mask", "cache", "precision")]
    options = [kinds(o) for o in classes_of(grouping, passes, None)[0].options]
    assert len(options) == len(set(options)) == 2**3
    assert ("mask", "cache", "precision") in options


def test_what_is_removed_excludes_what_changes_it(grouping):
    removal = Says("prune", ("drop the first",), ("structure",), "model")
    classes = classes_of(grouping, (Says("masks", ("w64",)), removal), None)
    assert [len(c.options) for c in classes] == [2, 2, 2]
    assert exclusions_of(classes) == (((0, 1), (2, 1)),)
    assert uniform(classes, "masks: w64") == (1, 1, 0)
    assert uniform(classes, "prune: drop the first") == (0, 0, 1)
    assert [m.candidate.kind for m in moves_of(classes, (0, 1, 1))] == ["w64", "drop the first"]


def test_tied_candidates(grouping):
    classes = classes_of(grouping, (Says("shared", ("a", "b"), tie="both"), Says("caches", ("int8",), ("cache",))), None)
    assert ties_of(classes) == (((0, 1), (1, 1)), ((0, 2), (1, 2)))
    assert [kinds(o) for o in classes[0].options] == [(), ("a",), ("b",), ("int8",)]  # a tied one is not combined


def test_groups_are_what_the_pass_asked_for(grouping):
    seen: list[Group] = []

    class Looks(Says):
        def propose(self, group, evidence):
            seen.append(group)
            return []

    classes_of(grouping, (Looks("looks", (), per="model"),), None)
    assert [g.sites for g in seen] == [grouping.sites]


def test_two_passes_do_not_store_one_cache(grouping):
    """Each is a class of its own where passes look at the whole model; keys of one and values of another go together."""
    forms = ("cache(k=int8, v=int8)", "cache(k=int4, v=fp32)", "cache(k=fp32, v=int4)")
    passes = [Says(f"store{i}", ("all",), ("weights",), "model", cached=form) for i, form in enumerate(forms)]
    assert exclusions_of(classes_of(grouping, passes, None)) == (((0, 1), (1, 1)), ((0, 1), (2, 1)))
