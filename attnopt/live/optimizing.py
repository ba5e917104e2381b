"""`optimize` for a transformers model that generates: the result is such a model, of the same class.

fast = optimize(model, budget=0.01, calibration=texts, tokenizer=tok)      fast.generate(…)      fast.save_pretrained("fast/")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from attnopt.asked import Asked, Checked
from attnopt.errors import BudgetError, UnsupportedFormat
from attnopt.hosts.module.host import TRACED, ModuleHost
from attnopt.hosts.module.model import generates
from attnopt.hosts.module.traceable import runs_here, traceable
from attnopt.ir.site import Refusal
from attnopt.live.caches import Kept, Wishes, kept
from attnopt.live.comparing import Rewritten, compare, rewritten, unheld
from attnopt.live.records import before, dressed
from attnopt.live.telling import lines, named
from attnopt.opening import Opened
from attnopt.plan.live.converting import Live, live, read_back
from attnopt.plan.live.crossover import settled
from attnopt.plan.live.folding import fold_live, without_folds
from attnopt.plan.live.foretelling import Foretold
from attnopt.plan.live.generating import Used, on_prompts, paces, spoken, usual
from attnopt.plan.live.layers import Chooser
from attnopt.plan.live.texts import GIVE, prompt, token_batches
from attnopt.plan.pipeline import Request, run
from attnopt.report.data import Report


@dataclass(frozen=True)
class Task:
    """A model with what is asked for it. model: as it is traced and timed; host: its trace; inputs: those of the trace.

    earlier: changes that it records already, where it is a live model; notes: what is said of how it was opened."""

    model: Any
    host: ModuleHost
    inputs: Mapping[str, Tensor]
    asked: Asked
    checked: Checked
    request: Request
    earlier: list[dict[str, Any]] | None
    notes: tuple[str, ...]

    @property
    def own(self) -> str:
        """The attention of the model itself."""
        return str(self.model.config._attn_implementation)


def optimize_live(model: Any, asked: Asked, tokenizer: Any = None) -> Any:
    """A live model. Raises what `optimize` raises, BudgetError for a budget without data, UnsupportedFormat for what is no such model."""
    task = opened(model, asked, tokenizer)
    folded = fold_live(task.host, task.request)
    host: ModuleHost = folded.host  # type: ignore[assignment]
    wishes = Wishes.of(asked, task.checked, task.request)
    request = wishes.rest(without_folds(task.request))
    _, report = run(host, replace(request, takes=partial(unheld, host, task.inputs)))
    made, plan, report, said = converted(host, report, request, task, wishes)
    compare(host, plan, made, task.inputs)
    caches = kept(host, task.model, made, request, wishes)
    if caches.judged:
        report = replace(report, budget=task.checked.budget.allowed)
    steps = () if report.plan is None else report.plan.steps
    notes = [*report.notes, *task.notes, *said, *caches.notes, *lines(made, plan.specs)]
    notes += [] if caches.stored is None else caches.on_codes(made.model, caches.stored)
    if request.select != "always" and (host.folds or made.changes or made.layers or caches.any):
        notes += told_paces(task, host, made, steps, caches)
    report = replace(report, refusals=named(report.refusals), notes=tuple(notes), rewrites=(*folded.reports, *report.rewrites))
    if report.plan is not None:
        report = replace(report, plan=replace(report.plan, steps=(*folded.steps, *steps)))
    changes = [*(task.earlier or ()), *(c.to_json() for c in host.folds)]
    return dressed(made, report, caches.policy, caches.words, changes, caches.on_codes, str(caches.choice or ""), caches.on_pages)


def opened(model: Any, asked: Asked, tokenizer: Any) -> Task:
    if not generates(model):
        raise UnsupportedFormat(
            f"{type(model).__name__} is no transformers model that generates with one stack of layers",
            next_move='Leave host="module" out, and give example_inputs for a traced model.',
        )
    earlier, asked_for = before(model), model.config._attn_implementation
    model = model if earlier is None and runs_here(model) else traceable(model)
    checked = asked.checked()
    batches = None if asked.calibration is None else token_batches(asked.calibration, tokenizer)
    if not checked.budget.exact and batches is None and checked.plan is None:
        raise BudgetError("a budget needs data on which the loss is measured", next_move=GIVE)
    inputs = batches[0] if batches else prompt(model)
    host = ModuleHost.open(model, {**inputs, "use_cache": False}, lifts=asked.minimise == "memory")
    request = replace(asked, calibration=batches).request(Opened(host, inputs, "torch", 0), checked)
    if request.workload is not None:
        request = replace(request, workload=on_prompts(request.workload))
    elif not checked.budget.exact and request.minimise == "time" and checked.plan is None:
        request = replace(request, workload=on_prompts(usual(inputs["input_ids"].shape[1])))
    notes = []
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
    return Task(model, host, inputs, asked, checked, request, earlier, tuple(notes))


def converted(
    host: ModuleHost, report: Report, request: Request, task: Task, wishes: Wishes
) -> tuple[Live, Rewritten, Report, list[str]]:
    """The model that the plan of a report makes, that plan, the report, and what it says: without the plan where modules cannot hold it."""
    plan = rewritten(host, report, request)
    changes = read_back(host, plan.edited)
    fuses = any(p.exact for p in request.passes) and (request.plan is None or bool(request.plan.kernels))
    device = next(task.model.parameters()).device.type
    chooser = Chooser(request.select, task.checked.machine, device=device, own_sdpa=task.own == "sdpa")
    made_of = partial(live, host, inputs=task.inputs, chooser=chooser, fuses=fuses, known=wishes.known)
    made = changes if isinstance(changes, Refusal) else made_of(changes, planned=plan.specs)
    unmade = made if isinstance(made, Refusal) else next((r for path, r in made.refusals.items() if path in plan.specs), None)
    said: list[str] = []
    if unmade is not None:
        said.append(f"the plan stays on paper, a live model cannot hold it: {unmade}")
        plan = Rewritten(host, host)
        report = replace(report, plan=None if report.plan is None else replace(report.plan, steps=()))
        made = made_of([])
    assert isinstance(made, Live)
    if request.select == "measure":
        made, of_steps = settled(host, made)
        said += of_steps
    if fuses and not made.layers:
        why = "; ".join(dict.fromkeys(c.why for c in chooser.chosen.values()))
        said.append(f"live: every layer computes attention as before ({why or 'no layer was recognised'})")
    return made, plan, report, said


def told_paces(task: Task, host: ModuleHost, made: Live, steps: Any, caches: Kept) -> list[str]:
    """Of generation before and after, measured and predicted."""
    policy, form, choice = caches.policy, caches.form, caches.choice
    ids = task.inputs["input_ids"][:1]
    own, keep = task.own if task.own in TRACED else "sdpa", 1.0 if policy is None else policy.keep
    foretold = Foretold(host, task.checked.machine, own, form, keep, choice, task.host).paces(made, steps, ids.shape[1])
    used = {"before": Used(task.model), "after": Used(made.model, policy, form, choice, live=True)}
    return spoken(paces(used, ids) if task.request.select == "measure" else {}, foretold, ids.shape[1])
