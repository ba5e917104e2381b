"""Sparse attention as calls of plain kernels: choose tiles, compute from the list, correct.

    … pooled_blocks(64, 64) delta(64)   ->   … blocks(64, 64, operand=selected_tiles), and dense rows 0, 64, 128, … and the last

`kernels` are the specs that are computed, in any language; `run_sparse` puts their results together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from attnopt.codegen import corrected, gathered, listed
from attnopt.codegen.gathered import Parts
from attnopt.codegen.listed import EACH, TILES, Run
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.site_form import form_of
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec

CHOSEN = {TILES: "bool", EACH: "bool"}  # operands that no model has


def refuses(spec: AttentionSpec) -> Refusal | None:
    """None where the spec is more than one plain kernel, and this is how to compute it."""
    if spec.correction is not None:
        found = corrected.refuses(spec)
        own = listed.refuses(spec.with_(correction=None)) if spec.selection is not None else None
        return found or own
    return listed.refuses(spec)


def kernels(spec: AttentionSpec) -> tuple[AttentionSpec, ...]:
    """The specs of the kernels. Ask `refuses` first."""
    if spec.correction is None:
        return (listed.listed(spec) if listed.refuses(spec) is None else spec,)
    whole = corrected.dense(spec)
    own = kernels(spec.with_(correction=None))
    return (*own, corrected.every(whole, max(1, spec.correction.count(0))), corrected.last_rows(whole))


def refuses_site(site: Site, supports: Callable[[AttentionSpec, Form], Refusal | None]) -> Refusal | None:
    """None where kernels of a family compute the site. supports: whether the family computes one spec."""
    form, spec = form_of(site), site.spec
    if isinstance(form, Refusal):
        return form
    if (absent := next((name for name in spec.operands if name not in site.operands), None)) is not None:
        return Refusal(f"{absent} is not known inside the kernel", site.name)
    if spec.correction is not None and site.size("q") != site.size("k"):
        return Refusal("only a whole prompt is corrected: queries and keys are not the same positions", site.name)
    if (refused := refuses(spec)) is not None:
        return refused
    known = dict(form.operands) | CHOSEN
    own = ((each, replace(form, operands=tuple((name, known[name]) for name in each.operands))) for each in kernels(spec))
    return next((refused for each, shape in own if (refused := supports(each, shape)) is not None), None)


def run_sparse(
    run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor], parts: Parts | None = None
) -> Tensor:
    """The output [B, H, Q, E] for q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E]. run: computes a spec that `kernels` lists.

    parts: for a family whose kernels compute gathered queries faster than a list of what their neighbours chose.
    """
    if spec.correction is not None:
        return corrected.run_corrected(partial(run_sparse, run, parts=parts), run, spec, q, k, v, operands)
    if parts is not None and gathered.refuses(spec) is None:
        return gathered.run_gathered(parts, spec, q, k, v)
    found: Tensor = (listed.run_listed if listed.refuses(spec) is None else _plain)(run, spec, q, k, v, operands)
    return found


def _plain(run: Run, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = run(spec, q, k, v, operands)
    return found
