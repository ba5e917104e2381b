"""The Triton kernels of a whole model (see codegen/site_kernels).

write_kernels(sites, "sm_90", folder)   ->   attention_0.py attention_0.ptx … for each distinct attention, in the folder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attnopt.codegen import site_form
from attnopt.codegen.site_kernels import SiteKernel, write_distinct
from attnopt.codegen.triton import decode_files
from attnopt.codegen.triton.compile import Compiled
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.files import write
from attnopt.codegen.triton.prefill import Form
from attnopt.codegen.triton.row_norms import gains
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec


def write_kernels(sites: Sequence[Site], architecture: str, folder: Path, dtype: str | None = None) -> tuple[SiteKernel, ...]:
    """Write the files of every distinct kernel into an existing folder; dtype of q, k and v, where it is not to be the model's."""

    def write_decode(spec: AttentionSpec, form: Form, name: str) -> Compiled | Refusal:
        decode = DecodeForm(form.width, form.value_width, form.dtype, form.operands, form.lse, lengths=False)
        return decode_files.write(spec, decode, architecture, folder, name)

    forms = [(site, form_of(site, dtype)) for site in sites]
    return write_distinct(forms, lambda spec, form, name: write(spec, form, architecture, folder, name), write_decode)


def form_of(site: Site, dtype: str | None = None) -> Form | Refusal:
    """What the kernel of a site is compiled for."""
    form = site_form.form_of(site, dtype)
    return form if isinstance(form, Refusal) else replace(form, limits=limits_of(site))


def limits_of(site: Site) -> tuple[tuple[str, float], ...]:
    """The largest magnitude in each gain of a norm that is a weight of the model: what bounds the scores."""
    named = [name for name in gains(site.spec.qk_norm).values() if name in site.operands]
    loads = {name: load for name in named if (load := site.operands[name].value.load) is not None}
    return tuple((name, float(load().abs().max())) for name, load in loads.items())
