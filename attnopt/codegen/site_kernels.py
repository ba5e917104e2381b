"""The kernels of a whole model: one for each attention that differs in spec or form, written out once.

    layers 0-11: softmax causal [.., 64], layer 12: softmax [.., 64]   ->   attention_0 (12 sites), attention_1 (1 site)

Where queries follow a past, or are few, there is also one that splits the keys: attention_0_decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.site_form import decodes
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec

Write = Callable[[AttentionSpec, Form, str], Any]  # the files of one kernel under a name; what was made, or a Refusal


@dataclass(frozen=True)
class SiteKernel:
    """A kernel, or why there is none, and the names of the sites that it is for. result: what its language's compiler made."""

    name: str
    spec: AttentionSpec
    sites: tuple[str, ...]
    result: Any


def write_distinct(sites: Sequence[tuple[Site, Form | Refusal]], write: Write, write_decode: Write) -> tuple[SiteKernel, ...]:
    """One kernel for each distinct spec and form; `write` and `write_decode` make the files of the two families."""
    alike: dict[tuple[AttentionSpec, Form | Refusal], list[Site]] = {}
    for site, form in sites:
        alike.setdefault((site.spec, form), []).append(site)
    made: list[SiteKernel] = []
    for at, ((spec, form), group) in enumerate(alike.items()):
        name, names = f"attention_{at}", tuple(site.name for site in group)
        made.append(SiteKernel(name, spec, names, form if isinstance(form, Refusal) else write(spec, form, name)))
        if not isinstance(form, Refusal) and any(map(decodes, group)):
            made.append(SiteKernel(f"{name}_decode", spec, names, write_decode(spec, form, f"{name}_decode")))
    return tuple(made)
