"""A live model with its report and plan, as `optimize` returns it and as `load` reads it from a folder.

dressed(model, report, …).save_pretrained("fast/")   ->   load_live("fast/"): the same layers, kernels and caches
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attnopt.hosts.eviction.chosen import ChosenPolicy
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module.interface import BEFORE, WINDOWS
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention, OnCodes
from attnopt.hosts.module.model import RECORD, LiveModel, as_live
from attnopt.hosts.module.saving import read_record, restored
from attnopt.ir.by_layer import of_layer
from attnopt.ir.clause import Clause
from attnopt.passes.kvcache.eviction import BY_NAME
from attnopt.plan.live.codes import CodesChooser, give, with_kernel
from attnopt.plan.live.converting import Live, attach
from attnopt.plan.live.layers import with_kernels
from attnopt.plan.live.pages import PagesChooser
from attnopt.plan.live.pages import restored as page_readers
from attnopt.report.data import Report
from attnopt.report.plan import Plan


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
