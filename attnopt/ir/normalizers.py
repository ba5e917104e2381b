"""How a row of scores becomes a row of weights: the normaliser slot, one function a name.

    weights, output = NORMALIZERS["softmax"](row)

Sources: softmax1 and sinks as an extra logit (gpt-oss); "Cog Attention" (signed_softmax); "Normalized attention without
probability cage" (zscore); "Sinkformers" (sinkhorn); "QDSFormer" (orthogonal); "FAST / Fastmax" (polynomial);
linear attention (linear); "Linear transformers are secretly fast weight programmers" and "Lightning Attention-2" (recurrent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.expr import Const, Expr
from attnopt.ir.spec import AttentionSpec

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RowContext:
    """Everything a normaliser may read. Shapes: q, k, v [B, H, L, D]; scores, visible [B, H, Q, K]; sink [B, H, Q, 1]."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    visible: Tensor
    sink: Tensor | None
    value_of: Callable[[Expr], Tensor]

    def option(self, name: str) -> Tensor:
        value = self.spec.normalizer.get(name)
        return self.value_of(value if not isinstance(value, (int, float)) else Const(value))  # type: ignore[arg-type]

    def finish(self, weights: Tensor) -> Result:
        """Weights of invisible keys are zero; a row that sees nothing gets what `empty` says."""
        weights = weights.masked_fill(~self.visible, 0.0)
        if self.spec.empty_row == "mean" and self.sink is None:
            empty = ~self.visible.any(-1, keepdim=True)
            weights = torch.where(empty, torch.full_like(weights, 1.0 / weights.shape[-1]), weights)
        return weights, weights @ self.v


def softmax(row: RowContext) -> Result:
    """exp(s_ij) / (sum_j exp(s_ij) + exp(sink))."""
    scores = row.scores.masked_fill(~row.visible, -torch.inf)
    if row.sink is not None:
        scores = torch.cat([scores, row.sink], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)
    return row.finish(weights[..., : row.scores.shape[-1]])


def sigmoid(row: RowContext) -> Result:
    return row.finish(torch.sigmoid(row.scores))


def signed_softmax(row: RowContext) -> Result:
    """sign(s) exp(|s|) / sum exp(|s|)."""
    magnitude = row.scores.abs().masked_fill(~row.visible, -torch.inf)
    return row.finish(row.scores.sign() * torch.nan_to_num(torch.softmax(magnitude, -1), nan=0.0))


def zscore(row: RowContext) -> Result:
    """gain * (s - mean) / sqrt(var + 1e-8) + shift, over the visible keys of the row."""
    count = row.visible.sum(-1, keepdim=True).clamp(min=1)
    seen = row.scores.masked_fill(~row.visible, 0.0)
    centred = row.scores - seen.sum(-1, keepdim=True) / count
    variance = centred.square().masked_fill(~row.visible, 0.0).sum(-1, keepdim=True) / count
    return row.finish(row.option("gain") * centred / (variance + 1e-8).sqrt() + row.option("shift"))


def sinkhorn(row: RowContext) -> Result:
    """Row and column log-normalisations in turn, starting with rows; one iteration is softmax.

    Rows sum to 1 after an odd count. Columns are brought to sum to Q / K.
    """
    log_p = row.scores.masked_fill(~row.visible, -torch.inf)
    columns_sum = torch.log(torch.tensor(row.scores.shape[-2] / row.scores.shape[-1], dtype=log_p.dtype))
    for iteration in range(int(row.spec.normalizer.args[0])):  # type: ignore[arg-type]
        axis = -2 if iteration % 2 else -1
        total = torch.logsumexp(log_p, axis, keepdim=True)
        log_p = log_p - total.masked_fill(total.isinf(), 0.0) + (columns_sum if iteration % 2 else 0.0)
    return row.finish(log_p.exp())


def orthogonal(row: RowContext) -> Result:
    """Scores = U R; weights = U * U, doubly stochastic. Square and unmasked only."""
    weights = torch.linalg.qr(row.scores)[0].square()
    return row.finish(weights)


def polynomial(row: RowContext) -> Result:
    """f(s) / sum f(s), f the Taylor polynomial of exp of the given order."""
    order = int(row.spec.normalizer.args[0])  # type: ignore[arg-type]
    term = weights = torch.ones_like(row.scores)
    for n in range(1, order + 1):
        term = term * row.scores / n
        weights = weights + term
    weights = weights.masked_fill(~row.visible, 0.0)
    return row.finish(weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny))


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu1": lambda x: F.elu(x) + 1.0,
    "relu": torch.relu,
    "exp": torch.exp,
    "softmax": lambda x: torch.softmax(x, -1),
    "square": torch.square,
    "cube": lambda x: x**3,
    "hedgehog": lambda x: torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1),
}


def linear(row: RowContext) -> Result:
    """phi(q) . phi(k), divided by the row's sum unless denominator=none. Score terms do not act; the mask does."""
    feature = FEATURES[str(row.spec.normalizer.args[0])]
    weights = (feature(row.q) @ feature(row.k).transpose(-1, -2)).masked_fill(~row.visible, 0.0)
    if row.spec.normalizer.get("denominator") == "sum":
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return row.finish(weights)


def recurrent(row: RowContext) -> Result:
    """S_t = decay_t (S_{t-1} - erase_t k_t (k_t' S_{t-1})) + write_t k_t v_t',  o_t = S_t' q_t. Causal by construction.

    erase = write = beta is the delta rule, erase = 0 with a constant decay is retention. The weights it stands for:
    w_ti = write_i (prod_{s>i} decay_s (I - erase_s k_s k_s') k_i) . q_t.
    """
    feature = FEATURES[str(row.spec.normalizer.get("feature"))]
    q, k = feature(row.q), feature(row.k)
    batch, heads, length, width = k.shape
    decay, erase, write = (
        row.option(n).expand(batch, heads, length, length).diagonal(dim1=-2, dim2=-1)[..., None] for n in ("decay", "erase", "write")
    )
    # Carrying the identity as "values" gives the weights, and from them the output, with one recurrence.
    state = q.new_zeros(batch, heads, width, length)
    eye = torch.eye(length, dtype=q.dtype, device=q.device)
    rows = []
    for t in range(length):
        key = k[:, :, t, :, None]
        state = decay[:, :, t, :, None] * (state - erase[:, :, t, :, None] * key * (key.transpose(-1, -2) @ state))
        state = state + write[:, :, t, :, None] * key * eye[t]
        rows.append((q[:, :, t, None, :] @ state)[:, :, 0])
    weights = torch.stack(rows, 2)
    return weights, weights @ row.v


def weights_(row: RowContext) -> Result:
    """The scores themselves are the weights: static maps, position-only attention."""
    return row.finish(row.scores)


NORMALIZERS: dict[str, Callable[[RowContext], Result]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "signed_softmax": signed_softmax,
    "zscore": zscore,
    "sinkhorn": sinkhorn,
    "orthogonal": orthogonal,
    "polynomial": polynomial,
    "linear": linear,
    "recurrent": recurrent,
    "weights": weights_,
}
