"""`optimize` for a transformers model that generates: the result is such a model, of the same class.

fast = optimize(model, budget=0.01, calibration=texts, tokenizer=tok)      fast.generate(…)      fast.save_pretrained("fast/")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.asked import Asked
from attnopt.cost.target import load_target
from attnopt.errors import BudgetError, UnsupportedFormat
from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.host import TRACED, ModuleHost
from attnopt.hosts.module.interface import BEFORE, WINDOWS
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention, OnCodes
from attnopt.hosts.module.model import RECORD, LiveModel, as_live, generates, read_whole
from attnopt.hosts.module.saving import read_record, restored
from attnopt.hosts.module.traceable import runs_here, traceable
from attnopt.ir.by_layer import of_layer
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.opening import Opened
from attnopt.passes.kvcache.eviction import BY_NAME
from attnopt.plan.judge.verify import require_equal, require_rounded_alike
from attnopt.plan.live.codes import CodesChooser, give, with_kernel
from attnopt.plan.live.coding import coded, is_cache_pass
from attnopt.plan.live.converting import Live, attach, calls_of, changed, live, read_back, reshapes
from attnopt.plan.live.crossover import settled
from attnopt.plan.live.evicting import half_of, proposed
from attnopt.plan.live.folding import fold_live, without_folds
from attnopt.plan.live.foretelling import Foretold
from attnopt.plan.live.generating import Used, on_prompts, paces, spoken, usual
from attnopt.plan.live.layers import Chooser, with_kernels
from attnopt.plan.live.nudging import nudged
from attnopt.plan.live.pages import PagesChooser
from attnopt.plan.live.pages import restored as page_readers
from attnopt.plan.live.paging import Paging, is_page_pass
from attnopt.plan.live.steps import long_decode, timed_on
from attnopt.plan.live.text_layers import text_layers
from attnopt.plan.live.texts import GIVE, prompt, token_batches
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.workshop import Workshop, respecified
from attnopt.plan.pipeline import Request, run
from attnopt.plan.replay import moves_from
from attnopt.report.data import Report
from attnopt.report.plan import Plan


def optimize_live(model: Any, asked: Asked, tokenizer: Any = None) -> Any:
    """A live model. Raises what `optimize` raises, BudgetError for a budget without data, UnsupportedFormat for what is no such model."""
    if not generates(model):
        raise UnsupportedFormat(
            f"{type(model).__name__} is no transformers model that generates with one stack of layers",
            next_move='Leave host="module" out, and give example_inputs for a traced model.',
        )
    earlier = before(model)
    asked_for = model.config._attn_implementation
    model = model if earlier is None and runs_here(model) else traceable(model)
    checked = asked.checked()
    batches = None if asked.calibration is None else token_batches(asked.calibration, tokenizer)
    if not checked.budget.exact and batches is None and checked.plan is None:
        raise BudgetError("a budget needs data on which the loss is measured", next_move=GIVE)
    inputs = batches[0] if batches else prompt(model)
    host = ModuleHost.open(model, {**inputs, "use_cache": False}, lifts=asked.minimise == "memory")
    opened = Opened(host, inputs, "torch", 0)
    request = replace(asked, calibration=batches).request(opened, checked)
    if request.workload is not None:
        request = replace(request, workload=on_prompts(request.workload))
    elif not checked.budget.exact and request.minimise == "time" and checked.plan is None:
        request = replace(request, workload=on_prompts(usual(inputs["input_ids"].shape[1])))
    given, folded = host, fold_live(host, request)
    host = folded.host  # type: ignore[assignment]
    request = without_folds(request)
    batch, length = long_decode(checked.workload)
    asks = asked.passes is not None or request.minimise == "memory" or length > 0
    codes = [p for p in request.passes if is_cache_pass(p)] if asks else []
    codes = [] if checked.budget.exact or batches is None or checked.plan is not None else codes
    quests = [p for p in request.passes if is_page_pass(p)]
    by_cache = [*codes, *quests]  # a trace of a prompt has no site for them
    if by_cache and not checked.budget.exact:
        request = replace(request, passes=tuple(p for p in request.passes if p not in by_cache))
    asks = asked.passes is not None or (request.minimise == "time" and length > 0)
    quests = [] if not asks or checked.budget.exact or batches is None or checked.plan is not None else quests
    if checked.policies or codes or (quests and length):
        request = replace(request, budget=half_of(request.budget))
    _, report = run(host, replace(request, takes=partial(unheld, host, inputs)))
    plan = rewritten(host, report, request)
    changes = read_back(host, plan.edited)
    notes: list[str] = []
    if earlier is not None:
        notes.append(
            "the given model was live: what its layers hold stays, and losses, times and the plan count from it; what its cache was "
            "kept by does not"
        )
    elif asked_for != model.config._attn_implementation:
        notes.append(
            f"{asked_for} does not run on this device: before is the model by sdpa, which also computes what no kernel does"
        )
    if request.workload is not None:
        notes.append(f"planned for {request.workload}; a step of decoding counts as a prompt of one token")
    own = model.config._attn_implementation
    fuses = any(p.exact for p in request.passes) and (request.plan is None or bool(request.plan.kernels))
    device = next(model.parameters()).device.type
    chooser = Chooser(request.select, checked.machine, device=device, own_sdpa=own == "sdpa")
    pages = checked.plan.cache_pages if checked.plan is not None else ""
    known = bool(pages or (quests and length))
    made = changes if isinstance(changes, Refusal) else live(host, changes, inputs, chooser, plan.specs, fuses=fuses, known=known)
    unmade = made if isinstance(made, Refusal) else next((r for path, r in made.refusals.items() if path in plan.specs), None)
    if unmade is not None:
        notes.append(f"the plan stays on paper, a live model cannot hold it: {unmade}")
        plan, report = (
            Rewritten(host, host),
            replace(report, plan=None if report.plan is None else replace(report.plan, steps=())),
        )
        made = live(host, [], inputs, chooser, fuses=fuses, known=known)
    assert isinstance(made, Live)
    if request.select == "measure":
        made, said = settled(host, made)
        notes += said
    compare(host, plan, made, inputs)
    policy: ChosenPolicy | None = None
    narrowed = any(held.narrowed for held in made.layers.values())
    if checked.policies and narrowed:
        notes.append(
            "no cache policy: a plan that narrows what layers see is not held beside one; name passes without such masks"
        )
    elif checked.policies and request.calibration is not None:
        policy, said = proposed(
            made.model, model, request.calibration, checked.budget, checked.policies, minimise=request.minimise, seed=request.seed
        )
        notes += said
        report = replace(report, budget=checked.budget.allowed)
    elif checked.plan is not None and checked.plan.cache_policy:
        policy = ChosenPolicy.from_json(checked.plan.cache_policy, BY_NAME)
        notes.append(f"cache policy {policy}: as the plan says")
    words = checked.plan.cache_codes if checked.plan is not None else ""
    on_codes = CodesChooser(request.select, idle=made.idle, windows=made.windows)
    on_pages = PagesChooser(idle=made.idle, windows=made.windows)
    if quests and policy is not None:
        notes.append(f"no pages beside {policy}: what a policy keeps is read whole")
    elif quests and request.calibration is not None:
        paging = Paging(
            made.model, model, request.calibration, checked.budget, on_pages, batch, length, request.seed, request.minimise
        )
        chosen, said = paging.taken(quests)
        pages, notes, report = chosen or "", notes + said, replace(report, budget=checked.budget.allowed)
    choice, on_choice = on_pages.planned(made.model, pages or None)
    if codes and choice is not None and asked.passes is not None:
        notes.append(f"no cache in codes beside {choice}: the kernel of pages reads numbers; name one of both")
    elif codes and policy is not None:
        notes.append(f"no cache in codes beside {policy}, which has its own storage")
    elif codes and request.calibration is not None:
        by_time = asked.passes is None and request.minimise == "time"
        timed = timed_on(made.model, on_codes, batch, length, choice) if by_time else None
        texts, seed = request.calibration, request.seed
        chosen, said = coded(made.model, model, texts, checked.budget, codes, seed, timed, text_layers(host, texts, seed))
        words, notes, report = chosen or "", notes + said, replace(report, budget=checked.budget.allowed)
    if words and choice is not None:
        notes.append(f"no {choice} beside a cache in codes, with which a step is faster")
        choice, on_choice = None, []
        read_whole(made.model)
    notes += on_choice
    notes = [*report.notes, *notes, *lines(made, chooser if fuses else None, plan.specs)]
    form, steps = live_form(words or None), () if report.plan is None else report.plan.steps
    stored = form if form is not None or policy is None else policy.clause
    notes += [] if stored is None else on_codes(made.model, stored)
    keep = 1.0 if policy is None else policy.keep
    if request.select != "always" and (host.folds or made.changes or made.layers or policy or form or choice):
        ids = inputs["input_ids"][:1]
        foretold = Foretold(host, checked.machine, own if own in TRACED else "sdpa", form, keep, choice, given).paces(
            made, steps, ids.shape[1]
        )
        used = {"before": Used(model), "after": Used(made.model, policy, form, choice, live=True)}
        notes += spoken(paces(used, ids) if request.select == "measure" else {}, foretold, ids.shape[1])
    report = replace(report, refusals=named(report.refusals), notes=tuple(notes), rewrites=(*folded.reports, *report.rewrites))
    if report.plan is not None:
        report = replace(report, plan=replace(report.plan, steps=(*folded.steps, *steps)))
    before_plan = [*(earlier or ()), *(c.to_json() for c in host.folds)]
    return dressed(made, report, policy, words, before_plan, on_codes, str(choice or ""), on_pages)


def unheld(host: ModuleHost, inputs: Mapping[str, Tensor], result: Any) -> Refusal | None:
    """Why a rewritten graph cannot be read back as the modules of a live model; None where it can."""
    found: Any = read_back(host, result)
    if not isinstance(found, Refusal) and reshapes(found):
        found = calls_of(changed(host.model, found), found, inputs)
    return replace(found, reason=f"a live model cannot hold it: {found.reason}") if isinstance(found, Refusal) else None


@dataclass(frozen=True)
class Rewritten:
    """The graph after a plan. edited: with the model's own attention, what stands in its nodes is read back from them. whole: with
    kernels for the attentions that the plan changed. specs: of those, by the paths of their modules.
    """

    edited: ModuleHost
    whole: ModuleHost
    specs: Mapping[str, AttentionSpec] = field(default_factory=dict)


def rewritten(host: ModuleHost, report: Report, request: Request) -> Rewritten:
    if report.plan is None or not report.plan.steps:
        return Rewritten(host, host)
    sizes = host.graph.sizes(request.inputs or {})
    shop = Workshop(host, {}, load_target(request.target)[0], request.runtime, request.opset, sizes)
    moves = shop.arrays.ready(moves_from(report.plan.steps, host))
    edited: Any = shop.edited(host.copy(), [m for m in moves if m.edits], {})
    others = [m for m in moves if not m.edits]
    if not others:
        return Rewritten(edited, edited)
    specs = {site.source.module: site.spec for site in respecified(Grouping(edited), others).values()}
    whole: Any = shop.rewritten(moves, brief=True)
    return Rewritten(edited, whole, specs)


def compare(host: ModuleHost, plan: Rewritten, made: Live, inputs: Mapping[str, Tensor]) -> None:
    """Raises AccuracyError where the live model computes something else than the graph that it was made of.

    With another attention both read the tokens without padding: there the live model computes what only prompts have.
    """
    if plan.specs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    original = host.runner()(inputs)
    with torch.no_grad():
        logits = [made.model(**inputs, use_cache=False).logits]
    rounded = any(spec.selection or spec.precision for spec in plan.specs.values())
    if made.changes or rounded:
        require_rounded_alike(plan.whole.runner()(inputs), logits, original, nudged(made.model, inputs))
    else:
        require_equal(original if plan.whole is host else plan.whole.runner()(inputs), logits)


def before(model: Any) -> list[dict[str, Any]] | None:
    """The changes that a live model records already; None for another."""
    return getattr(model, RECORD)["changes"] if isinstance(model, LiveModel) else None


def dressed(
    made: Live,
    report: Report,
    policy: ChosenPolicy | None = None,
    words: str = "",
    earlier: Sequence[dict[str, Any]] = (),
    on_codes: CodesChooser | None = None,
    pages: str = "",
    on_pages: PagesChooser | None = None,
) -> Any:
    """The model with its report, its plan, and the record of it for a folder.

    words: how its cache is stored. pages: which pages of it are read. earlier: changes of an earlier plan."""
    config = made.model.config
    if report.plan is not None:
        kept = {} if policy is None else policy.to_json()
        report = replace(report, plan=replace(report.plan, cache_policy=kept, cache_codes=words, cache_pages=pages))
    record = {
        "attention": getattr(config, BEFORE, None) or config._attn_implementation,
        "windows": bool(getattr(config, WINDOWS, False)),
        "changes": [*earlier, *(c.to_json() for c in made.changes)],
        "layers": {path: layer_record(held) for path, held in made.layers.items()},
        "idle": {path: layer_record(held) for path, held in made.idle.items()},
        "report": json.loads(json.dumps(report.to_json(), default=str)),
        "plan": None if report.plan is None else report.plan.to_json(),
    }
    return as_live(made.model, report, report.plan, record, policy, words or None, on_codes, pages or None, on_pages)


def layer_record(held: LayerAttention) -> dict[str, Any]:
    return {
        "spec": held.spec,
        "call": asdict(held.call),
        "names": list(held.names),
        "narrowed": held.narrowed,
        "least": held.least,
    }


def load_live(folder: Path) -> Any:
    """The model that `save_pretrained` of a live model wrote. Its report is the record inside. Raises UnreadableModel."""
    record = read_record(folder)
    model, _ = restored(folder, record)
    device = next(model.parameters()).device.type
    layers, idle = (
        {path: restored_layer(each, device) for path, each in record.get(name, {}).items()} for name in ("layers", "idle")
    )
    attach(model, layers, windows=record["windows"])
    policy = record.get("cache_policy")
    chosen = None if policy is None else ChosenPolicy.from_json(policy, BY_NAME)
    stored = live_form(record.get("cache_codes")) or (None if chosen is None else chosen.clause)
    if stored is not None:
        both = {**idle, **layers}
        found = {
            path: kept_kernel(both[path], of_layer(stored, model.get_submodule(path).layer_idx), *each)
            for path, each in record.get("on_codes", {}).items()
        }
        give(model, both, found, windows=record["windows"])
    plan = None if record["plan"] is None else Plan.from_json(record["plan"])
    kept = {name: record[name] for name in ("attention", "windows", "changes", "layers", "report", "plan")}
    kept["idle"] = record.get("idle", {})
    on_codes = CodesChooser(idle=idle, windows=record["windows"])
    on_pages = PagesChooser(idle=idle, windows=record["windows"])
    if (choice := page_choice(record.get("cache_pages"))) is not None:
        chosen_by = page_readers({**idle, **layers}, choice, record["on_pages"])
        give(model, {**idle, **layers}, chosen_by, windows=record["windows"], field="on_pages")
    return as_live(
        model, record["report"], plan, kept, chosen, record.get("cache_codes"), on_codes, record.get("cache_pages"), on_pages
    )


def kept_kernel(held: LayerAttention, clause: Clause, name: str, why: str) -> OnCodes:
    return with_kernel(held, clause, name, why) if name else OnCodes(clause, why=why)


def restored_layer(each: Mapping[str, Any], device: str) -> LayerAttention:
    call = AttentionCall(**{**each["call"], "others": tuple(each["call"]["others"])})
    return with_kernels(each["spec"], call, each["names"], device, bool(each.get("narrowed", False)), each.get("least", 0))


def named(refusals: Sequence[Refusal]) -> tuple[Refusal, ...]:
    """Refusals with names in place of nodes, which hold the whole graph."""
    return tuple(Refusal(r.reason, r.node, r.reached, r.remedy) for r in refusals)


def lines(made: Live, chooser: Chooser | None, planned: Mapping[str, AttentionSpec]) -> list[str]:
    """What the report says of the live model."""
    said = []
    for phase, at in (("prefill", 0), ("decode", 1)):
        names = [x.names[at] or "the model's own" for x in made.layers.values()]
        if names:
            counted = ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))
            said.append(f"live, {phase}: {counted}")
    kept = [of_widths(o) for o in options_of(made, "widths")]
    said += [f"live, cache: {what}, in {kept.count(what)} layers" for what in dict.fromkeys(kept)]
    said += [f"live, {path}: computes '{made.layers[path].spec}'" for path in planned if path in made.layers]
    if chooser is not None and not made.layers:
        why = "; ".join(dict.fromkeys(c.why for c in chooser.chosen.values()))
        said.append(f"live: every layer computes attention as before ({why or 'no layer was recognised'})")
    by_reason: dict[str, list[str]] = {}
    for path, refusal in made.refusals.items():
        by_reason.setdefault(refusal.reason, []).append(path)
    return [
        *said,
        *(f"{paths[0]}" + f" and {len(paths) - 1} more" * (len(paths) > 1) + f": {why}" for why, paths in by_reason.items()),
    ]


def of_widths(o: Mapping[str, Any]) -> str:
    said = f"keys of {o['keys']} and values of {o['values']} channels, of {o['whole']}"
    said += ", keys lifted and turned whenever they are read" * ("turn" in o)
    reads = list(o.get("reads", ()))
    return said + (
        f"; {len(set(reads))} heads, read by {', '.join(str(reads.count(g)) for g in sorted(set(reads)))}" if reads else ""
    )


def options_of(made: Live, kind: str) -> list[Mapping[str, Any]]:
    return [change.options for change in made.changes if change.kind == kind]
