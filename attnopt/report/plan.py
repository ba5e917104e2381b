"""A plan as data: the kernel of each attention and every rewrite, with all that applying them again needs. It travels in the file.

    Plan.from_json(json.loads(text)) == plan          attnopt plan show fast.onnx

Nothing in it is searched again: factors of smoothing, windows, the layers that were removed stand in the options of their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from attnopt.errors import PlanError

VERSION = 1


@dataclass(frozen=True)
class PlanStep:
    """One rewrite of one group: names of the pass, the group and its nodes in the model as it was, and the options of the candidate.

    scales: layers of other groups that it scales. arrays: of the size of weights, by node name; they are in no plan's file (see
    `Candidate`), but stand in the model written with it.
    """

    rewrite: str
    per: str
    group: str
    kind: str
    description: str
    source: str = ""
    nodes: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    storage: Mapping[str, str] = field(default_factory=dict)
    cached: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rounds(self) -> bool:
        """Whether it stores weights, caches or operands in codes."""
        return bool(self.storage) or any(self.cached.values()) or "precision" in self.changes


@dataclass(frozen=True)
class Plan:
    """What was done to a model. host: "torch" or "onnx", whose names it uses. kernels: by site; a site that is absent is as it was.
    Where a step gives a site another spec, its kernel is predicted anew.

    seed, data: of the half of the data that it was chosen by, and the fingerprint of that half: what moves computed from it.
    cache_policy: of a live model, with share and storage, as `hosts.eviction.chosen` writes it; empty where its cache is whole.
    cache_codes: how a live model stores its cache, as a clause; empty where it is as it comes. cache_pages: which pages one query reads.
    metric, loss, bound: what the plan lost on the data that judged it; None for an exact plan, or where nothing was held back.
    """

    host: str
    target: str
    runtime: str
    kernels: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[PlanStep, ...] = ()
    budget: float = 0.0
    metric: str = ""
    loss: float | None = None
    bound: float | None = None
    seed: int = 0
    data: str = ""
    cache_policy: Mapping[str, Any] = field(default_factory=dict)
    cache_codes: str = ""
    cache_pages: str = ""
    version: int = VERSION

    @property
    def keeps_cache(self) -> bool:
        """Whether it says how a live model keeps or reads its cache."""
        return bool(self.cache_policy or self.cache_codes or self.cache_pages)

    def with_arrays(self, of: Callable[[PlanStep], Mapping[str, Mapping[str, Any]]]) -> Plan:
        """The plan with what was found for each of its steps."""
        return replace(self, steps=tuple(replace(s, arrays=of(s)) for s in self.steps))

    def to_json(self) -> dict[str, Any]:
        record = asdict(replace(self, steps=tuple(replace(s, arrays={}) for s in self.steps)))
        for step in record["steps"]:
            del step["arrays"]
        return record

    @classmethod
    def from_json(cls, record: Any) -> Plan:
        """Raises PlanError for what is no plan, or one of a newer version."""
        try:
            if int(record["version"]) > VERSION:
                raise PlanError(
                    f"the plan has version {record['version']}, this attnopt reads {VERSION}", next_move="Upgrade attnopt."
                )
            steps = tuple(
                PlanStep(**{**s, **{n: tuple(s.get(n, ())) for n in ("nodes", "removes", "scales", "changes")}})
                for s in record["steps"]
            )
            known = {f.name for f in fields(cls)}
            return cls(**{**{name: value for name, value in record.items() if name in known}, "steps": steps})
        except (KeyError, TypeError, ValueError) as failure:
            raise PlanError(f"this is no plan: {failure}", next_move="Give what `attnopt plan show --json` prints.") from None

    def __rich__(self) -> Any:
        from attnopt.report.search_table import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        from attnopt.report.table import as_text

        return as_text(self)
