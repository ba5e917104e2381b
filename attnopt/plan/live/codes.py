"""What one query does on a live cache in codes: the kernel that reads them, where it takes less time than reading them back.

    softmax scale(0.125), 6 heads on 2, cache(k=int8, v=int8)   ->   OnCodes(…, "tvm-decode"), measured 3.1x reading the codes back

Both are timed in turn on a cache of LENGTH tokens: the kernel on codes, and codes made numbers of for the attention that the layer has
without them. Where that is the model's own, torch's sdpa without a mask stands for it, which nothing of the model's own undercuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen import AS_STORED, ON_CPU, ON_GPU
from attnopt.codegen.operator_lowering import OperatorLowering
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.lowerings.tvm_blocks import TvmBlocks
from attnopt.codegen.tvm.lowerings.tvm_pieces import TvmPieces
from attnopt.codegen.tvm.piece_attention import run_tvm_exact_and_coded, run_tvm_sets
from attnopt.hosts.eviction.block_state import BlockState
from attnopt.hosts.eviction.ends import HeldEnds
from attnopt.hosts.eviction.live_forms import empty_side, keeps_blocks, keeps_ends
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.layer_attention import LayerAttention, OnCodes, OnPages
from attnopt.hosts.module.widths import lifts, spreads
from attnopt.ir.by_layer import CacheForm, of_layer
from attnopt.ir.clause import Clause
from attnopt.ir.packing import Packed
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.ir.token_blocks import TokenBlocks, token_blocks
from attnopt.plan.live.converting import attach
from attnopt.plan.live.layers import FASTER, LENGTH, one_query
from attnopt.plan.live.phases import DECODE, Shape, example
from attnopt.plan.timing.timing import counted, in_turn
from attnopt.report.data import Report

SAID = "live, decode on codes"


@dataclass(frozen=True)
class Run:
    """The operator of a lowering on the parts of a cache. line: the spec, which says how it is stored."""

    operator: Any
    line: str

    def __call__(self, q: Tensor, k: Packed, v: Packed) -> Tensor:
        made: Tensor = self.operator(q, k.codes, v.codes, k.scales, k.zeros, v.scales, v.zeros, None, None, [], self.line)
        return made


@dataclass(frozen=True)
class PiecesRun:
    """The same where some tokens are exact: the kernel reads them and those in codes by themselves."""

    line: str

    def __call__(self, q: Tensor, k: HeldEnds, v: HeldEnds) -> Tensor:
        return run_tvm_exact_and_coded(q, (k.exact, v.exact), (k.coded, v.coded), self.line)


@dataclass(frozen=True)
class SetsRun:
    """The same of tokens in full blocks, a set after the other. What waits is read by the layer itself, which learns from its weights."""

    line: str

    def __call__(self, q: Tensor, k: list[Packed], v: list[Packed]) -> list[tuple[Tensor, Tensor]]:
        return run_tvm_sets(q, k, v, self.line)


@dataclass(frozen=True)
class CodesChooser:
    """select: as in `optimize`. idle: layers that hold no kernel, by path. windows: as in `attach`, where one of them gets one."""

    select: str = "measure"
    length: int = LENGTH
    idle: Mapping[str, LayerAttention] = field(default_factory=dict)
    windows: bool = False

    def __call__(self, model: Any, form: CacheForm) -> list[str]:
        """Give the layers of a live model what they do on codes; what a report says of it, which stands in the model's then."""
        layers = {**self.idle, **held_by(model)}
        modules = {path: model.get_submodule(path) for path in layers}
        forms = {path: of_layer(form, module.layer_idx) for path, module in modules.items()}
        anew = {path for path, module in modules.items() if lifts(module) or spreads(module)}
        found = self.choose({path: held for path, held in layers.items() if path not in anew}, forms)
        found |= {path: OnCodes(forms[path], why="its keys are made anew when they are read") for path in anew}
        give(model, layers, found, windows=self.windows)
        return reported(model, lines(found), SAID)

    def choose(self, layers: Mapping[str, LayerAttention], clauses: Mapping[str, Clause]) -> dict[str, OnCodes]:
        """For each layer on its cache, by path; those that are alike are timed once."""
        known: dict[Any, OnCodes] = {}
        found = {}
        for path, held in layers.items():
            key = (Shape.of(held.call, held.device), held.spec, held.narrowed, held.names[1], clauses[path])
            if key not in known:
                known[key] = self.best(held, clauses[path])
            found[path] = known[key]
        return found

    def best(self, held: LayerAttention, clause: Clause) -> OnCodes:
        if held.reach is not None:
            return OnCodes(clause, why="a plan cuts the few keys that are seen out of the cache")
        lowering, why = self.fitting(held, clause)
        if lowering is None:
            return OnCodes(clause, why=why)
        made = with_kernel(held, clause, lowering.name)
        if self.select != "measure":
            return replace(made, why="the kernel that reads codes")
        return measured(held, made, self.length)

    def fitting(self, held: LayerAttention, clause: Clause) -> tuple[OperatorLowering | None, str]:
        """The lowering that reads such a cache here, or why none does."""
        elsewhere, why = ON_GPU if held.device == "cpu" else ON_CPU, "no kernel reads codes here"
        for lowering in kernels():
            if lowering in elsewhere:
                continue
            refused = lowering.missing() or lowering.refusal(spec_of(held, clause), form_of(held))
            if refused is None:
                return lowering, ""
            kind = "pieces" if keeps_ends(clause) else "blocks" if keeps_blocks(clause) else "decode"
            if lowering.operator.endswith(kind):  # the others are of other caches
                why = refused if isinstance(refused, str) else refused.reason
        return None, why


def kernels() -> list[OperatorLowering]:
    return [x for x in AS_STORED if isinstance(x, OperatorLowering)]


def form_of(held: LayerAttention) -> Form:
    return Form(held.call.width, held.call.value_width, held.call.dtype)


def spec_of(held: LayerAttention, clause: Clause) -> AttentionSpec:
    blocks = token_blocks(clause)
    told = blocks.clause_of_kernels if isinstance(blocks, TokenBlocks) else clause
    return one_query(parse(held.spec), held.narrowed).with_(cache=told)


def with_kernel(held: LayerAttention, clause: Clause, name: str, why: str = "") -> OnCodes:
    """By the kernel of this name, as when it was saved."""
    lowering, line = next(x for x in kernels() if x.name == name), str(spec_of(held, clause))
    if isinstance(lowering, TvmPieces):
        return OnCodes(clause, name, PiecesRun(line), why)
    if isinstance(lowering, TvmBlocks):
        return OnCodes(clause, name, SetsRun(line), why)
    return OnCodes(clause, name, Run(getattr(torch.ops.attnopt, lowering.operator).default, line), why)


@torch.no_grad()
def measured(held: LayerAttention, made: OnCodes, length: int) -> OnCodes:
    """The kernel, or none where it is not FASTER than what the layer does with numbers that are read back."""
    given = example(DECODE, Shape.of(held.call, held.device), batch=1, length=length)
    q, plain, run = given["q"], held.decode or by_sdpa(held), made.run
    assert run is not None
    stored, numbers = both_ways(made.clause, given["k"], given["v"])
    calls = {"codes": lambda: run(q, *stored), "numbers": lambda: plain(q, *numbers())}
    times = in_turn(calls, seconds=0.3, clock=counted())
    ratio = times["codes"].ratio(times["numbers"])
    said = f"measured {1 / ratio:.2f}x the speed of reading the codes back, at {length} tokens"
    return replace(made, why=said) if ratio <= FASTER else OnCodes(made.clause, why=f"{made.name} {said}")


def both_ways(clause: Clause, k: Tensor, v: Tensor) -> tuple[tuple[Any, Any], Callable[[], tuple[Tensor, Tensor]]]:
    """What a kernel reads of these tokens as they are stored, and what reads them back. Of blocks those that are full."""
    blocks = token_blocks(clause)
    if isinstance(blocks, TokenBlocks):
        state = BlockState(blocks)
        state.take(k, v)
        return (state.k_sets, state.values), lambda: state.numbers(k.dtype)
    one, other = (empty_side(clause, side).grown(x) for side, x in (("k", k), ("v", v)))
    return (one.packed, other.packed), lambda: (one.read(), other.read())


def by_sdpa(held: LayerAttention) -> Any:
    shared = held.call.key_heads != held.call.heads

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=held.call.scaling, enable_gqa=shared)

    return sdpa


def held_by(model: Any) -> dict[str, LayerAttention]:
    """The layers of a live model that hold a spec, by path."""
    return {path: getattr(module, HELD) for path, module in model.named_modules() if hasattr(module, HELD)}


def give(
    model: Any,
    layers: Mapping[str, LayerAttention],
    found: Mapping[str, OnCodes] | Mapping[str, OnPages],
    *,
    windows: bool,
    field: str = "on_codes",
) -> None:
    """Let the layers of a model do so. A layer that holds no kernel gets what it needs to run one. field: of a layer's attention."""
    there = held_by(model)
    attach(
        model, {path: layers[path] for path, each in found.items() if path not in there and each.run is not None}, windows=windows
    )
    for path, held in held_by(model).items():
        if path in found:
            changed: dict[str, Any] = {field: found[path]}
            setattr(model.get_submodule(path), HELD, replace(held, **changed))


def reported(model: Any, said: list[str], start: str) -> list[str]:
    """These lines, which stand in the report of a live model in the place of those that start alike."""
    if isinstance(getattr(model, "report", None), Report):
        others = (note for note in model.report.notes if not note.startswith(start))
        model.report = replace(model.report, notes=(*others, *said))
    return said


def lines(found: Mapping[str, OnCodes]) -> list[str]:
    """What a report says."""
    counted_by = Counter((each.name or "read back", each.why) for each in found.values())
    return [f"{SAID}: {name} in {n} layers ({why})" for (name, why), n in counted_by.items()]
