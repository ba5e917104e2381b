"""What a user asked for, checked before any work, and turned into a request once the model is open.

Asked(target="cpu", budget=0.01, …).checked()   ->   errors at once          .request(opened, …)   ->   Request
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.store import Store
from attnopt.cost.target import Target, load_target
from attnopt.cost.workload import Workload, parse_workload
from attnopt.errors import BudgetError, PlanError, UnknownPass
from attnopt.ir.eviction import Policy
from attnopt.opening import Opened
from attnopt.optimized import load
from attnopt.passes import ALL, Pass
from attnopt.passes.kvcache.eviction import policy_named
from attnopt.plan.judge.budget import QUALITY, Budget
from attnopt.plan.judge.quality import Score
from attnopt.plan.judge.verify import OwnModel
from attnopt.plan.pipeline import Request
from attnopt.plan.search.effort import Effort, effort_named
from attnopt.plan.search.search import GOALS
from attnopt.report.plan import Plan

SELECTS = ("measure", "model", "always")


@dataclass(frozen=True)
class Checked:
    """What needs no model to be understood."""

    machine: Target
    runtime: str | None
    passes: tuple[Pass, ...]
    budget: Budget
    effort: Effort
    workload: Workload | None
    plan: Plan | None
    store: Store
    policies: tuple[Policy, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The arguments of `attnopt.optimize`, whose docstring says what each is."""

    target: str = "cpu"
    budget: float | Budget = 0.0
    calibration: Any = None
    select: str | None = None
    passes: Sequence[str] | None = None
    quality: Score | None = None
    shapes: str | Sequence[str] | None = None
    effort: str = "low"
    seed: int = 0
    plan: Plan | str | Path | None = None
    cache: str | Path | None = None
    minimise: str = "time"
    tune: bool = False
    policies: Sequence[str | Policy] | None = None

    def checked(self) -> Checked:
        """Raises UnknownTarget, UnknownPass, BudgetError, WorkloadError, PlanError, OutputNotWritable."""
        machine, runtime = load_target(self.target)
        chosen = passes_named(self.passes)
        budget = budget_from(self.budget)
        if self.select is not None and self.select not in SELECTS:
            raise BudgetError(f"select={self.select!r} is none of {', '.join(SELECTS)}", next_move="Leave it out to measure.")
        if self.minimise not in GOALS:
            raise BudgetError(
                f"minimise={self.minimise!r} is neither of {' and '.join(GOALS)}", next_move="Leave it out for time."
            )
        if (self.quality is None) == (budget.metric == QUALITY):
            raise BudgetError(
                "a budget in quality needs a score"
                if self.quality is None
                else f"a score is given, but the budget is in {budget.metric}",
                next_move='Give quality=my_score and budget=Budget(metric="quality", drop=0.005).',
            )
        workload = None if self.shapes is None else parse_workload(self.shapes)
        plan = None if self.plan is None else plan_from(self.plan)
        effort = effort_named(self.effort)
        effort = replace(effort, tunes=effort.tunes or self.tune)
        policies = policies_named(self.policies, budget, plan)
        return Checked(machine, runtime, chosen, budget, effort, workload, plan, Store.open(self.cache), policies)

    def request(self, opened: Opened, checked: Checked, own: OwnModel | None = None) -> Request:
        """own: the model itself, where what was opened is a trace of it.

        Raises InputMismatch for calibration data that do not fit the model, or are too few to be cut in two.
        """
        data: Calibration | None = None if self.calibration is None else opened.calibration(self.calibration)
        if data is not None and not checked.budget.exact:
            data.split(self.seed)
        return Request(
            target=checked.machine.name,
            runtime=checked.runtime or opened.runtime,
            opset=opened.opset,
            select=self.select or ("measure" if at_hand(checked.machine, opened.inputs) else "model"),
            budget=checked.budget,
            passes=checked.passes,
            inputs=opened.inputs,
            calibration=data,
            names=tuple(opened.host.output_names),
            quality=self.quality,
            effort=checked.effort,
            seed=self.seed,
            workload=checked.workload,
            store=checked.store,
            plan=checked.plan,
            minimise=self.minimise,
            own=own,
            named=self.passes is not None,
        )


def policies_named(given: Sequence[str | Policy] | None, budget: Budget, plan: Plan | None) -> tuple[Policy, ...]:
    """Raises UnknownPolicy, BudgetError where none may lose anything, and PlanError where a plan says already which is used."""
    if not given:
        return ()
    found = tuple(policy_named(each) for each in ([given] if isinstance(given, str) else given))
    if plan is not None:
        raise PlanError("a plan holds its own cache policy, or none", next_move="Leave policies= or plan= out.")
    if budget.exact:
        raise BudgetError("a cache that forgets is not exact", next_move="Give budget=0.01, or leave policies= out.")
    return found


def budget_from(given: float | Budget) -> Budget:
    """A budget, or a bare number in the natural metric: an error then speaks of nothing but the number."""
    if isinstance(given, Budget):
        return given
    try:
        return Budget.of(given)
    except BudgetError as failure:
        raise BudgetError(failure.message, next_move=failure.next_move) from None


def plan_from(given: Plan | str | Path) -> Plan:
    """A plan, or the one in a .json, .onnx or .pt2 file. Raises PlanError, UnreadableModel."""
    if isinstance(given, Plan):
        return given
    path = Path(given)
    if path.suffix in (".onnx", ".pt2"):
        found = load(path).plan
        if found is None:
            raise PlanError(f"there is no plan in '{path}'", next_move="Give a file that attnopt wrote.")
        return found
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ValueError) as failure:
        raise PlanError(
            f"cannot read a plan from '{path}': {failure}", next_move="Give a .json, .onnx or .pt2 that holds one."
        ) from None


def at_hand(machine: Target, inputs: Mapping[str, Tensor] | None) -> bool:
    """Whether the model runs on the target now: this CPU, or a GPU of its architecture that the example inputs are on."""
    device = next((x.device for x in (inputs or {}).values() if x.device.type != "cpu"), None)
    if device is None or machine.kind == "cpu":
        return machine.kind == "cpu"
    from attnopt.codegen.triton.triton_attention import named

    return named(device) == machine.arch


def passes_named(names: Sequence[str] | None) -> tuple[Pass, ...]:
    if names is None:
        return ALL
    known = {p.name: p for p in ALL}
    for name in names:
        if name not in known:
            raise UnknownPass(name, list(known))
    return tuple(p for p in ALL if p.name in names)
