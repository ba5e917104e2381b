"""What a spec does to q, k and v before their product, and to the scores after it, in the order written.

q, k  --norm(rms)-->  rows of length sqrt(D)  --rotary(64)-->  rotated by position      scores = q k'
scores  --scale(0.125)--softcap(50.0)--add(load(bias, h, q, k))-->  what the normaliser sees
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.rows import Call

MODS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "square": torch.square,
    "silu": F.silu,
    "exp": torch.exp,
    "log1p": torch.log1p,
}


def normalize_rows(call: Call, x: Tensor, clause: Clause, side: str) -> Tensor:
    """`norm(rms | l2 | layer | longest)`: x [B, H, L, D] along D, times the gain [D] or [H, D] (or [H, 1]) where one is named.

    longest divides by the longest row of the head; center=yes subtracts each row's mean first; on=k leaves the queries alone.
    Sources: "Query-Key Normalization for Transformers"; "FAST" (center, longest).
    """
    if clause.word("on") not in ("both", side):
        return x
    kind, eps = clause.word(0), clause.number("eps")
    if clause.word("center") == "yes":
        x = x - x.mean(-1, keepdim=True)
    if kind == "l2":
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=eps)
    elif kind == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    elif kind == "layer":
        x = F.layer_norm(x, x.shape[-1:], eps=eps)
    else:
        x = x / x.norm(dim=-1, keepdim=True).amax(-2, keepdim=True).clamp(min=eps)
    gain = call.operand_or_none(clause, f"{side}_gain")
    return x if gain is None else x * (gain if gain.ndim == 1 else gain.unsqueeze(-2))


def angles_of(call: Call, clause: Clause, side: str) -> Tensor:
    """Angles of `rotary` for the rows of q or k, [B|1, H|1, L, dims / 2]: position * base^(-2i / dims).

    angles=name reads them instead: frequencies [dims / 2], or a table [positions, dims / 2].
    """
    dims = clause.count(0)
    position = call.row_value(clause.expr("q")) if side == "q" else call.key_value(clause.expr("k"))
    named = call.operand_or_none(clause, "angles")
    if named is not None and named.ndim == 2:
        return named[position.long().squeeze(-1)]
    if named is None:
        exponent = torch.arange(0, dims, 2, device=position.device, dtype=torch.float64) / dims
        named = clause.number("base") ** -exponent
    return position.to(torch.float64) * named


def rotate(x: Tensor, clause: Clause, angle: Tensor) -> Tensor:
    """Rotate channels first … first + dims of x [B, H, L, D] by angle [B|1, H|1, L, dims / 2].

    pairs=half couples channel i with i + dims/2, pairs=interleaved couples 2i with 2i + 1. Source: "RoFormer".
    """
    dims, start = clause.count(0), clause.count("first")
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    before, turning, after = x[..., :start], x[..., start : start + dims], x[..., start + dims :]
    if clause.word("pairs") == "half":
        first, second = turning[..., : dims // 2], turning[..., dims // 2 :]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([before, turned, after], -1)


def paired(x: Tensor, other: Tensor) -> Tensor:
    """`pair_keys`: row j * L2 + l is x_j * other_l; x [B, H, L1, D], other [B, H, L2, D]. Source: "Kronecker attention"."""
    return (x[..., :, None, :] * other[..., None, :, :]).flatten(-3, -2)


def repeat_heads(x: Tensor, key_heads: Tensor) -> Tensor:
    """[B, Hk, L, D] -> [B, H, L, D]: query head i reads head key_heads[i]."""
    return x if x.shape[1] == len(key_heads) and bool((key_heads.diff() == 1).all()) else x[:, key_heads]


ScoreTerm = Callable[[Call, Clause, Tensor, Tensor, Tensor, Tensor], Tensor]


def scale(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    return scores * call.value(clause.expr(0))


def softcap(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """c tanh(s / c)."""
    return clause.number(0) * torch.tanh(scores / clause.number(0))


def add(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    return scores + call.value(clause.expr(0))


def add_square(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """s + c |q_i|^2, or s + c |k_j|^2: with them a product becomes a distance. Source: "Probabilistic attention"."""
    square = q.square().sum(-1, keepdim=True) if clause.word(0) == "q" else k.square().sum(-1).unsqueeze(-2)
    return scores + call.value(clause.expr(1)) * square


def mod(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    return MODS[clause.word(0)](scores)


def conv(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    return convolve(call, clause, scores.masked_fill(~visible, 0.0))


def convolve(call: Call, clause: Clause, x: Tensor) -> Tensor:
    """y_ij = sum_ab w[a, b] x[i - (A - 1) + a, j - B // 2 + b], w [A, B] or [H, A, B]: earlier queries, keys on both sides.

    Source: "Multi-Token Attention". Hidden entries count as zero.
    """
    kernel = call.operand(clause, 0)
    kernel = kernel.expand(x.shape[1], *kernel.shape[-2:])
    rows, columns = kernel.shape[-2:]
    padded = F.pad(x, (columns // 2, columns - 1 - columns // 2, rows - 1, 0))
    return F.conv2d(padded, kernel[:, None], groups=x.shape[1])


def mix(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    return mix_heads(call, clause, scores.masked_fill(~visible, 0.0))


def mix_heads(call: Call, clause: Clause, x: Tensor) -> Tensor:
    """y_h = sum_g m[h, g] x_g, m [H, H]."""
    return torch.einsum("hg,bgqk->bhqk", call.operand(clause, 0), x)


def mix_weights(call: Call, clause: Clause, x: Tensor) -> Tensor:
    """y_h = sum_g m[h, g] x_g + bias_h, bias [H] where one is named."""
    bias = call.operand_or_none(clause, "bias")
    mixed = mix_heads(call, clause, x)
    return mixed if bias is None else mixed + bias[:, None, None]


def lookahead_keys(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """s_ts - silu(c q_t . u_s^t), u_s^t = sum_{s < j <= t} sigmoid(c lq_s . lk_j) lv_j, and j <= s + window where one is given.

    Source: "CASTLE". What a key learns from later tokens, up to the query.
    """
    lq, lk, lv = (call.operand(clause, name) for name in "qkv")
    factor = call.value(clause.expr(0), "")
    key = torch.arange(lk.shape[-2], device=q.device)
    ahead = key[None] > key[:, None]
    if clause.count("window"):
        ahead &= key[None] <= key[:, None] + clause.count("window")
    gate = torch.sigmoid(factor * lq @ lk.transpose(-1, -2)).masked_fill(~ahead, 0.0)
    read = (factor * q @ lv.transpose(-1, -2)).masked_fill(key[None] > call.grid.index("q")[0, 0], 0.0)
    return scores - F.silu(read @ gate.transpose(-1, -2))


def pyramid(call: Call, clause: Clause, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """Each tile of m queries by n keys reads its keys averaged by its level p (1, 2, 4, …), and not at all at level 0.

    The score of p keys averaged, plus log p, and their averaged value weigh as p equal scores do: each score becomes the mean of
    its p neighbours. Source: "Pyramid Sparse Attention". levels [B|1, H|1, ceil(Q / m), ceil(K / n)].
    """
    rows, columns = clause.count(0), clause.count(1)
    levels = call.operand(clause, "levels").repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    levels = levels[..., : scores.shape[-2], : scores.shape[-1]].expand_as(scores)
    result = scores.masked_fill(levels == 0, -torch.inf)
    for level in levels.unique():
        if level > 1:
            member = torch.arange(scores.shape[-1], device=scores.device) // int(level)
            same = (member[:, None] == member[None]).to(scores.dtype)
            result = torch.where(levels == level, scores @ (same / same.sum(0)), result)
    return result


SCORE_TERMS: dict[str, ScoreTerm] = {
    "scale": scale,
    "softcap": softcap,
    "add": add,
    "add_square": add_square,
    "mod": mod,
    "conv": conv,
    "mix": mix,
    "lookahead_keys": lookahead_keys,
    "pyramid": pyramid,
}


def apply_score_terms(call: Call, scores: Tensor, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """The score terms of the spec in their order; scores, visible [B, H, Q, K]."""
    for clause in call.spec.score:
        scores = SCORE_TERMS[clause.name](call, clause, scores, q, k, visible)
    return scores
