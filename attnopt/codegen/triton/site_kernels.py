"""The kernels of a whole model: one for each attention that differs in spec or form, written out once.

    layers 0-11: softmax causal [.., 64], layer 12: softmax [.., 64]   ->   attention_0 (12 sites), attention_1 (1 site)

Where queries follow a past, or are few, there is also one that splits the keys: attention_0_decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnopt.codegen.triton import decode_files
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.files import write
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.row_norms import gains
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec

FEW = 16  # rows of the smallest product of tensor cores


@dataclass(frozen=True)
class SiteKernel:
    """A kernel, or why there is none, and the names of the sites that it is for."""

    name: str
    spec: AttentionSpec
    sites: tuple[str, ...]
    result: Compiled | Refusal


def write_kernels(sites: Sequence[Site], architecture: str, folder: Path, dtype: str | None = None) -> tuple[SiteKernel, ...]:
    """Write the files of every distinct kernel into an existing folder; dtype of q, k and v, where it is not to be the model's."""
    alike: dict[tuple[AttentionSpec, Form | Refusal], list[str]] = {}
    for site in sites:
        alike.setdefault((site.spec, form_of(site, dtype)), []).append(site.name)
    made: list[SiteKernel] = []
    for at, ((spec, form), names) in enumerate(alike.items()):
        name = f"attention_{at}"
        result = form if isinstance(form, Refusal) else write(spec, form, architecture, folder, name)
        made.append(SiteKernel(name, spec, tuple(names), result))
        if not isinstance(form, Refusal) and any(site.name in names and decodes(site) for site in sites):
            decode = DecodeForm(form.width, form.value_width, form.dtype, form.operands, form.lse, lengths=False)
            result = decode_files.write(spec, decode, architecture, folder, f"{name}_decode")
            made.append(SiteKernel(f"{name}_decode", spec, tuple(names), result))
    return tuple(made)


def decodes(site: Site) -> bool:
    """Whether few queries meet many keys here: so few are known, or they follow keys of calls before."""
    queries = site.size("q")
    return queries <= FEW if isinstance(queries, int) else site.spec.offset is not None


def form_of(site: Site, dtype: str | None = None) -> Form | Refusal:
    """What the kernel of a site is compiled for."""
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read, and a fused kernel never makes them", site.weights_used.op)
    width, value_width = site.size("d"), site.size("e")
    if not isinstance(width, int) or not isinstance(value_width, int):
        return Refusal(f"rows of {width} and {value_width} channels: a kernel needs numbers", site.name)
    operands = tuple((name, site.operands[name].value.dtype) for name in site.spec.operands if name in site.operands)
    return Form(width, value_width, dtype or site.q.value.dtype, operands, limits=limits_of(site))


def limits_of(site: Site) -> tuple[tuple[str, float], ...]:
    """The largest magnitude in each gain of a norm that is a weight of the model: what bounds the scores."""
    named = [name for name in gains(site.spec.qk_norm).values() if name in site.operands]
    loads = {name: load for name in named if (load := site.operands[name].value.load) is not None}
    return tuple((name, float(load().abs().max())) for name, load in loads.items())
