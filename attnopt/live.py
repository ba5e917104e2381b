"""`optimize` for a transformers model that generates: the result is such a model, of the same class.

fast = optimize(model, budget=0.01, calibration=texts, tokenizer=tok)      fast.generate(…)      fast.save_pretrained("fast/")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.asked import Asked
from attnopt.cost.target import load_target
from attnopt.errors import BudgetError, InputMismatch, UnsupportedFormat
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.interface import BEFORE, WINDOWS
from attnopt.hosts.module.layer_attention import AttentionCall
from attnopt.hosts.module.model import as_live, generates
from attnopt.hosts.module.saving import read_record, restored
from attnopt.ir.site import Refusal
from attnopt.opening import Opened
from attnopt.plan.folding import is_fold
from attnopt.plan.judge.verify import require_equal, require_rounded_alike
from attnopt.plan.live.converting import Live, attach, live, read_back
from attnopt.plan.live.layers import Chooser, with_kernels
from attnopt.plan.live.nudging import nudged
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.pipeline import Request, run
from attnopt.plan.replay import moves_from
from attnopt.report.data import Report
from attnopt.report.plan import Plan

LONGEST, ROWS = 256, 8  # tokens of a calibration text that are read, and texts of one batch
GIVE = "Give calibration=texts with tokenizer=tok, or calibration=batches of input_ids."


def optimize_live(model: Any, asked: Asked, tokenizer: Any = None) -> Any:
    """A live model. Raises what `optimize` raises, BudgetError for a budget without data, UnsupportedFormat for what is no such model."""
    if not generates(model):
        raise UnsupportedFormat(
            f"{type(model).__name__} is no transformers model that generates with one stack of layers",
            next_move='Leave host="module" out, and give example_inputs for a traced model.',
        )
    checked = asked.checked()
    batches = None if asked.calibration is None else token_batches(asked.calibration, tokenizer)
    if not checked.budget.exact and batches is None and checked.plan is None:
        raise BudgetError("a budget needs data on which the loss is measured", next_move=GIVE)
    inputs = batches[0] if batches else prompt(model)
    host = ModuleHost.open(model, {**inputs, "use_cache": False})
    opened = Opened(host, inputs, "torch", 0)
    request = replace(asked, calibration=batches).request(opened, checked)
    folds = [p.name for p in request.passes if is_fold(p)]
    request = replace(request, passes=tuple(p for p in request.passes if not is_fold(p)))
    _, report = run(host, request)
    result = edited(host, report, request)
    changes = read_back(host, result)
    notes: list[str] = []
    if asked.passes is not None and folds:
        notes.append(f"{', '.join(folds)}: folds are for traced graphs, a live model keeps its layers and shares their weights")
    if isinstance(changes, Refusal):
        notes.append(f"the plan stays on paper, a live model cannot hold it: {changes}")
        changes, result, report = [], host, replace(report, plan=None if report.plan is None else replace(report.plan, steps=()))
    own = model.config._attn_implementation
    fuses = any(p.exact for p in request.passes) and (request.plan is None or bool(request.plan.kernels))
    device = next(model.parameters()).device.type
    chooser = Chooser(request.select, checked.machine, device=device, own_sdpa=own == "sdpa") if fuses else None
    made = live(host, changes, inputs, chooser)
    compare(host, result, made, inputs)
    return dressed(made, replace(report, refusals=named(report.refusals), notes=(*report.notes, *notes, *lines(made, chooser))))


def edited(host: ModuleHost, report: Report, request: Request) -> ModuleHost:
    """The graph after the rewrites of the plan, with the model's own attention: what stands in its nodes is read back from them."""
    if report.plan is None or not report.plan.steps:
        return host
    sizes = host.graph.sizes(request.inputs or {})
    shop = Workshop(host, {}, load_target(request.target)[0], request.runtime, request.opset, sizes)
    return shop.edited(host.copy(), shop.arrays.ready(moves_from(report.plan.steps, host)), {})  # type: ignore[return-value]


def compare(host: ModuleHost, result: ModuleHost, made: Live, inputs: Mapping[str, Tensor]) -> None:
    """Raises AccuracyError where the live model computes something else than the graph that it was made of."""
    original = host.runner()(inputs)
    with torch.no_grad():
        logits = [made.model(**inputs, use_cache=False).logits]
    if made.changes:
        require_rounded_alike(result.runner()(inputs), logits, original, nudged(made.model, inputs))
    else:
        require_equal(original, logits)


def dressed(made: Live, report: Report) -> Any:
    """The model with its report, its plan, and the record of it for a folder."""
    config = made.model.config
    record = {
        "attention": getattr(config, BEFORE, None) or config._attn_implementation,
        "windows": bool(getattr(config, WINDOWS, False)),
        "changes": [c.to_json() for c in made.changes],
        "layers": {p: {"spec": x.spec, "call": asdict(x.call), "names": list(x.names)} for p, x in made.layers.items()},
        "report": json.loads(json.dumps(report.to_json(), default=str)),
        "plan": None if report.plan is None else report.plan.to_json(),
    }
    return as_live(made.model, report, report.plan, record)


def load_live(folder: Path) -> Any:
    """The model that `save_pretrained` of a live model wrote. Its report is the record inside. Raises UnreadableModel."""
    record = read_record(folder)
    model, _ = restored(folder, record)
    device = next(model.parameters()).device.type
    layers = {
        path: with_kernels(
            each["spec"], AttentionCall(**{**each["call"], "others": tuple(each["call"]["others"])}), each["names"], device
        )
        for path, each in record["layers"].items()
    }
    attach(model, layers, windows=record["windows"])
    plan = None if record["plan"] is None else Plan.from_json(record["plan"])
    kept = {name: record[name] for name in ("attention", "windows", "changes", "layers", "report", "plan")}
    return as_live(model, record["report"], plan, kept)


def named(refusals: Sequence[Refusal]) -> tuple[Refusal, ...]:
    """Refusals with names in place of nodes, which hold the whole graph."""
    return tuple(Refusal(r.reason, r.node, r.reached, r.remedy) for r in refusals)


def lines(made: Live, chooser: Chooser | None) -> list[str]:
    """What the report says of the live model."""
    said = []
    for phase, at in (("prefill", 0), ("decode", 1)):
        names = [x.names[at] or "the model's own" for x in made.layers.values()]
        if names:
            counted = ", ".join(f"{name} in {names.count(name)} layers" for name in dict.fromkeys(names))
            said.append(f"live, {phase}: {counted}")
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


# What the model reads.


def prompt(model: Any, rows: int = 2, length: int = 128) -> dict[str, Tensor]:
    """Random tokens, the same each time; an exact plan needs no others."""
    size = int(model.config.get_text_config().vocab_size)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    ids = torch.randint(0, size, (rows, min(length, longest)), generator=torch.Generator().manual_seed(0))
    return masked(ids.to(next(model.parameters()).device))


def masked(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def token_batches(given: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of input_ids and attention_mask from texts, tensors of tokens, or dictionaries. Raises InputMismatch.

    Of a text its first LONGEST tokens count; texts of that length are read ROWS at a time, shorter ones alone, so that none is padded.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, (Iterable, Tensor)):
        raise InputMismatch("calibration is no list of texts or batches", where=type(given).__name__, next_move=GIVE)
    items = [given] if isinstance(given, (Tensor, Mapping)) else list(given)
    if items and all(isinstance(x, str) for x in items):
        if tokenizer is None:
            raise InputMismatch("calibration holds texts, and there is no tokenizer", next_move="Give tokenizer=tok.")
        return of_equal_length([tokenizer(text)["input_ids"][:LONGEST] for text in items])
    made = []
    for i, item in enumerate(items):
        found = item.get("input_ids") if hasattr(item, "keys") else item
        if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
            raise InputMismatch("a batch holds no input_ids [B, L]", where=f"calibration batch {i}", next_move=GIVE)
        mask = item.get("attention_mask") if hasattr(item, "keys") else None
        made.append(masked(found, mask))
    if not made:
        raise InputMismatch("calibration is empty", next_move=GIVE)
    return made


def of_equal_length(rows: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        if len(row) > 1:
            by_length.setdefault(len(row), []).append(row)
    if not by_length:
        raise InputMismatch("no calibration text has two tokens", next_move="Give longer texts.")
    found = [torch.tensor(part) for _, part in sorted(by_length.items(), reverse=True)]
    return [masked(ids) for part in found for ids in part.split(ROWS)]
