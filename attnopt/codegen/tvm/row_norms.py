"""Normalised queries and keys in TVM's kernels: what prefill_norms.py is filled in with. Gains come in as [heads or 1, width or 1].

norm(rms, q_gain=g, k_gain=f)   ->   channel_factor: g[h, d] * f[key_head, d]
"""

from __future__ import annotations

from attnopt.codegen.specialise import Value
from attnopt.codegen.triton.row_norms import NORMS, gains, normed
from attnopt.codegen.tvm.operand_buffers import buffer_name
from attnopt.ir.spec import AttentionSpec


def constants(spec: AttentionSpec) -> dict[str, Value]:
    norm = spec.qk_norm
    if norm is None:
        return dict.fromkeys(("NORMS", "Q_NORM", "K_NORM", "GAINS", "CENTERED"), False)
    centred = norm.word(0) == "layer" or norm.word("center") == "yes"
    sides = {"Q_NORM": normed(norm, "q"), "K_NORM": normed(norm, "k"), "GAINS": bool(gains(norm)), "CENTERED": centred}
    return {"NORMS": True, **sides, "NORM": NORMS[norm.word(0)], "EPS": norm.number("eps")}


def holes(spec: AttentionSpec) -> dict[str, str]:
    factors = []
    for side, operand in gains(spec.qk_norm).items():
        name, head = buffer_name(operand), "h" if side == "q" else "key_head"
        factors.append(f'T.cast({name}[T.min({head}, {name}.shape[0] - 1), T.min(d, {name}.shape[1] - 1)], "float32")')
    if not factors:
        return {}
    return {
        "channel_factor": f'def channel_factor(h, key_head, d, operands):\n    """{spec.qk_norm}"""\n    return {" * ".join(factors)}\n'
    }
