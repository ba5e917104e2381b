"""The TVM kernels of a whole model (see codegen/site_kernels).

write_kernels(sites, host(), folder)   ->   attention_0_tir.py attention_0.so attention_0.py … for each distinct attention
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.site_form import form_of
from attnopt.codegen.site_kernels import SiteKernel, write_distinct
from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.tvm.cpu import Cpu
from attnopt.codegen.tvm.files import Emitted, write, write_decode
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec


def write_kernels(sites: Sequence[Site], cpu: Cpu, folder: Path, dtype: str | None = None) -> tuple[SiteKernel, ...]:
    """Write the files of every distinct kernel into an existing folder; dtype of q, k and v, where it is not to be the model's."""

    def decoding(spec: AttentionSpec, form: Form, name: str) -> Emitted | Refusal:
        decode = DecodeForm(form.width, form.value_width, form.dtype, form.operands, form.lse, lengths=False)
        return write_decode(spec, decode, cpu, folder, name)

    forms = [(site, form_of(site, dtype)) for site in sites]
    return write_distinct(forms, lambda spec, form, name: write(spec, form, cpu, folder, name), decoding)
