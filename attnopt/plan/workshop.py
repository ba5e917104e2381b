"""Build what moves describe: a copy of the original with weights edited, sites rewritten, and a kernel for each attention.

    edits of the host -> finish -> new specs of sites -> kernels -> finish

Each result is made from the original, so no move sees what another trial left. Sites that no move touches keep the kernel that was
chosen for the exact plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.codegen.lowering import Lowering
from attnopt.cost.estimate import estimate
from attnopt.cost.target import Target
from attnopt.ir.dims import evaluate
from attnopt.ir.graph import Value
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes import Group
from attnopt.plan.choose import applicable, emit, reread
from attnopt.plan.groups import Grouping
from attnopt.plan.proposals import Move

WIDEST = "triton-prefill"  # the family that computes most: where it refuses too, its reason is the one to tell


@dataclass
class Workshop:
    """The original, the kernel of each of its sites (by name; absent where its own nodes stay), and what kernels run on."""

    host: Host
    kernels: Mapping[str, Lowering]
    target: Target
    runtime: str
    opset: int
    sizes: Mapping[str, int]
    known: dict[tuple[str, str], Lowering | Refusal] = field(default_factory=dict)

    def built(self, moves: Sequence[Move]) -> Host:
        """A copy of the original after these moves, with kernels. Raises RuntimeError where a move has no kernel."""
        result = self.host.copy()
        edits = [m for m in moves if m.edits]
        if edits:
            there = Grouping(result)
            for move in edits:
                move.rewrite.apply(move.candidate, twin(there, move))
                if "structure" in move.candidate.changes:  # what the next move reads is not there any more: look anew
                    result.finish()
                    there = Grouping(result)
            result.finish()
        rewritten = [m for m in moves if not m.edits]
        if not rewritten and not self.kernels and not any(m.candidate.shapes for m in edits):
            return result
        changed: dict[str, Site] = {}
        there = Grouping(result)
        reshaped = {name for m in edits for name in m.candidate.shapes}
        for move in rewritten:
            group = twin(there, move)
            group = replace(group, sites=tuple(changed.get(s.name, s) for s in group.sites))
            changed |= {s.name: s for s in move.rewrite.apply(move.candidate, group).sites}
        replaced: dict[Value, Value] = {}
        for site in there.sites:
            lowering: Lowering | Refusal | None = self.kernels.get(site.name)
            if site.name in changed:
                lowering = self.kernel_for(changed[site.name])
            elif site.name in reshaped:  # written as plain nodes; what suited the old heads may not suit the new ones
                lowering = self.faster(site)
            if isinstance(lowering, Refusal) and site.name in changed:
                raise RuntimeError(f"no kernel computes '{changed[site.name].spec}': {lowering.reason}")
            if lowering is not None and not isinstance(lowering, Refusal):
                current = reread(changed.get(site.name, site), replaced)
                replaced[site.output.value] = emit(result, current, lowering)
        result.finish()
        return result

    def kernel_for(self, site: Site) -> Lowering | Refusal:
        """The kernel that is predicted to compute a rewritten site fastest, or why there is none."""
        key = (str(site.spec), str(site.shape))
        if key not in self.known:
            fits, refused = applicable(site, self.host, self.runtime, self.opset, self.target.kind, self.target.arch)
            told = {choice.kernel: choice.why for choice in refused}
            reason = told.get(WIDEST) or next(iter(told.values()), f"no kernel for host {self.host.kind}")
            why = Refusal(reason, site.name)
            self.known[key] = min(fits, key=lambda x: self.seconds(site, x.name), default=None) or why
        return self.known[key]

    def faster(self, site: Site) -> Lowering | None:
        """The kernel for a site whose nodes were written anew; None where its nodes are predicted to be as fast."""
        found = self.kernel_for(site)
        if isinstance(found, Refusal):
            return None
        fused = any(node.op == "attention" for node in site.nodes)
        plain = {
            ("torch", True): "sdpa",
            ("torch", False): "eager",
            ("onnx", True): "onnx-attention",
            ("onnx", False): "ort-eager",
        }
        return found if self.seconds(site, found.name) < self.seconds(site, plain[self.host.kind, fused]) else None

    def seconds(
        self, site: Site, kernel: str, sizes: Mapping[str, int] | None = None, shape_after: Mapping[str, int] | None = None
    ) -> float:
        """Predicted seconds of one call, on the example's sizes where no others are given. shape_after: axes of other sizes."""
        try:
            shape = {axis: evaluate(dim, self.sizes if sizes is None else sizes) for axis, dim in site.shape.items()}
            shape |= shape_after or {}
        except KeyError:  # a length that only running the model would tell: the first kernel that fits
            return 0.0
        return estimate(site.spec, shape, site.q.value.dtype or "float32", kernel, target=self.target).seconds


def twin(there: Grouping, move: Move) -> Group:
    """The group of a move in an equal host. Raises RuntimeError where an earlier move left none of that name."""
    found = next((g for g in there.of(move.rewrite.per) if g.name == move.group.name), None)
    if found is None:
        raise RuntimeError(f"'{move.group.name}' is not there any more")
    return found
