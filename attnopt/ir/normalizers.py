"""How a row of scores becomes a row of weights: the normaliser slot, one function a name, and the products that it works on.

    scores = products(call, q, k)         q k', or phi(q) phi(k)', or what a recurrence reads
    weights = NORMALIZERS["softmax"](rows)

Weights of hidden keys and of rows that see nothing are the business of `reference`. This file is long because feature maps and
the recurrence are what the linear normalisers are.

Sources: softmax1 and sinks as an extra logit (gpt-oss); "Cog Attention" (signed_softmax); "Normalized attention without
probability cage" (zscore); "Sinkformers" (sinkhorn); "QDSFormer" (orthogonal, birkhoff); "FAST" (polynomial); "KArAt" (kolmogorov);
"Routing Transformer" (routed); "MALA" (magnitude); "RALA" (reweigh); "Linear transformers are secretly fast weight programmers",
"Lightning Attention-2", "EFLA", "ReGLA" and RWKV-7 (recurrent).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.operand_terms import angles_of, rotate
from attnopt.ir.rounded_products import rounded_scores
from attnopt.ir.rows import Call, Rows


@dataclass(frozen=True)
class Side:
    """What a feature map may know besides x [B, H, L, D]: on which side it stands, its order, and its channel spread."""

    name: str
    order: int
    spread: Tensor | float = 1.0


def dpfp(x: Tensor, side: Side) -> Tensor:
    """r = [relu(x); relu(-x)]; r * roll(r, 1), …, r * roll(r, order). Source: "Fast weight programmers" (DPFP)."""
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(i, -1) for i in range(1, side.order + 1)], -1)


def focused(x: Tensor, side: Side) -> Tensor:
    """x^p |x| / |x^p| of the positive part, norms over all channels of a token. Source: "FLatten Transformer"."""
    y = (x.relu() + 1e-6) / side.spread
    power = y**side.order
    return power * (y.norm(dim=(1, 3), keepdim=True) / power.norm(dim=(1, 3), keepdim=True))


def norm_split(x: Tensor, side: Side) -> Tensor:
    """Halves by sign; queries raise their direction to a power that grows with their norm. Source: "NaLaFormer"."""
    if side.name == "k":
        x = x.sign() * x.abs() ** side.order
        return torch.cat([x.relu(), (-x).relu()], -1)
    norm = x.norm(dim=-1, keepdim=True)
    power = side.order * (0.5 + torch.tanh(norm))
    direction = x / norm.clamp(min=torch.finfo(x.dtype).tiny)
    return torch.cat([direction.relu() ** power, (-direction).relu() ** power], -1)


def safe_exp(x: Tensor, side: Side) -> Tensor:
    """exp(x - max): over the channels of a query, over channels and positions of the keys. Source: "ReGLA"."""
    return torch.exp(x - x.amax(-1 if side.name == "q" else (-2, -1), keepdim=True))


FEATURES: dict[str, Callable[[Tensor, Side], Tensor]] = {
    "identity": lambda x, side: x,
    "elu1": lambda x, side: F.elu(x) + 1.0,
    "relu": lambda x, side: torch.relu(x),
    "exp": lambda x, side: torch.exp(x),
    "softmax": lambda x, side: torch.softmax(x, -1),
    "square": lambda x, side: torch.square(x),
    "cube": lambda x, side: x**3,
    "silu": lambda x, side: F.silu(x),
    "hedgehog": lambda x, side: torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1),
    "dpfp": dpfp,
    "focused": focused,
    "norm_split": norm_split,
    "safe_exp": safe_exp,
}
UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "l1": lambda x: x / x.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny),
    "l2": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny),
}


def products(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scores before the score terms, [B, H, Q, K], and those that are summed where they are others."""
    name = call.spec.normalizer.name
    if name == "linear":
        return feature_products(call, q, k)
    if name == "recurrent" and call.spec.normalizer.operand("value_decay") is None:
        return recurrent_reads(call, q, k, identity_values(k)), None
    if name == "recurrent":  # every value channel forgets at its own pace: no one weight per key
        return q.new_full((*q.shape[:3], k.shape[2]), torch.nan), None
    return dot(call, q, k), None


def dot(call: Call, q: Tensor, k: Tensor) -> Tensor:
    precision = call.spec.precision
    return q @ k.transpose(-1, -2) if precision is None else rounded_scores(call, q, k, precision)


def feature_products(call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """phi(q) phi(k)'; `rotary(on=features)` turns each D channels of the features, for the weights but not for their sum."""
    clause, width = call.spec.normalizer, q.shape[-1]
    spread = call.operand_or_none(clause, "spread")
    spread = 1.0 if spread is None else spread if spread.ndim == 1 else spread.unsqueeze(-2)
    q = q * call.row_value(clause.expr("q_gain"))
    k = k * call.key_value(clause.expr("k_gain"))
    phi_q, phi_k = (mapped(x, clause.word(0), clause, side, spread) for x, side in ((q, "q"), (k, "k")))
    if clause.word("reweigh") == "mean_query":
        mean = phi_q.mean(-2, keepdim=True)
        share = torch.softmax((phi_k * mean).sum(-1, keepdim=True) / math.sqrt(width), -2)
        phi_k = phi_k * share * k.shape[-2]
    position = call.spec.position
    if position is None or position.word("on") == "rows":
        return dot(call, phi_q, phi_k), None
    turned = []
    for x, side in ((phi_q, "q"), (phi_k, "k")):
        angle = angles_of(call, position, side)
        turned.append(torch.cat([rotate(part, position, angle) for part in x.split(width, -1)], -1))
    return dot(call, *turned), phi_q @ phi_k.transpose(-1, -2)


def mapped(x: Tensor, feature: str, clause: Clause, side: str, spread: Tensor | float = 1.0) -> Tensor:
    return UNITS[clause.word("unit")](FEATURES[feature](x, Side(side, clause.count("order"), spread)))


def identity_values(k: Tensor) -> Tensor:
    """Values that tell one key from another: a recurrence over them reads the weights."""
    batch, heads, length, _ = k.shape
    return torch.eye(length, dtype=k.dtype, device=k.device).expand(batch, heads, length, length)


def recurrent_reads(call: Call, q: Tensor, k: Tensor, values: Tensor) -> Tensor:
    """o_t = S_t' q_t over the state S, which runs over the keys:

        P = decay_t diag(key_decay_t) S_{t-1} diag(value_decay_t)
        S_t = P - erase_t x_t (y_t' P) + write_t k_t v_t'      x, y = erase_write, erase_read, where left out k

    erase_from=previous reads S_{t-1} instead of P. step=exact holds k and v for a time beta: erase and write become
    (1 - exp(-beta |k|^2)) / |k|^2. A query reads the state at its position. values [B, H, K, E] -> [B, H, Q, E].
    """
    clause = call.spec.normalizer
    q, k = (mapped(x, clause.word("feature"), clause, side) for x, side in ((q, "q"), (k, "k")))
    decay, erase, write = (call.key_value(clause.expr(name)) for name in ("decay", "erase", "write"))
    if clause.word("step") == "exact":
        erase, write = (held(x, k.square().sum(-1, keepdim=True)) for x in (erase, write))
    ones = torch.ones_like(k[..., :1])
    key_decay, value_decay, read, put = (
        default if (found := call.operand_or_none(clause, name)) is None else found
        for name, default in (("key_decay", ones), ("value_decay", ones), ("erase_read", k), ("erase_write", k))
    )
    state = torch.zeros(*k.shape[:2], k.shape[-1], values.shape[-1], dtype=k.dtype, device=k.device)
    states = []
    for t in range(k.shape[-2]):
        column = slice(t, t + 1)  # [B, H, 1, …] rows; transposed they are columns of the state's key axis
        kept = decay[:, :, column] * key_decay[:, :, column].transpose(-1, -2) * state * value_decay[:, :, column]
        source = kept if clause.word("erase_from") == "decayed" else state
        erased = erase[:, :, column] * put[:, :, column].transpose(-1, -2) * (read[:, :, column] @ source)
        state = kept - erased + write[:, :, column] * k[:, :, column].transpose(-1, -2) * values[:, :, column]
        states.append(state)
    at = call.grid.index("q").flatten().clamp(0, k.shape[-2] - 1)
    return torch.stack([q[:, :, i : i + 1] @ states[int(t)] for i, t in enumerate(at)], 2).squeeze(3)


def held(beta: Tensor, square: Tensor) -> Tensor:
    safe = square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where(square == 0, beta, -torch.expm1(-beta * square) / safe)


def softmax(rows: Rows) -> Tensor:
    """exp(s_ij) / (sum_j exp(s_ij) + exp(sink))."""
    scores = rows.scores.masked_fill(~rows.visible, -torch.inf)
    if rows.sink is not None:
        scores = torch.cat([scores, rows.sink], -1)
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)[..., : rows.scores.shape[-1]]


def sigmoid(rows: Rows) -> Tensor:
    return torch.sigmoid(rows.scores)


def signed_softmax(rows: Rows) -> Tensor:
    """sign(s) exp(|s|) / sum exp(|s|)."""
    magnitude = rows.scores.abs().masked_fill(~rows.visible, -torch.inf)
    return rows.scores.sign() * torch.nan_to_num(torch.softmax(magnitude, -1), nan=0.0)


def zscore(rows: Rows) -> Tensor:
    """gain * (s - mean) / sqrt(var + 1e-8) + shift, over the visible keys of the row."""
    clause, call = rows.spec.normalizer, rows.call
    count = rows.visible.sum(-1, keepdim=True).clamp(min=1)
    seen = rows.scores.masked_fill(~rows.visible, 0.0)
    centred = rows.scores - seen.sum(-1, keepdim=True) / count
    variance = centred.masked_fill(~rows.visible, 0.0).square().sum(-1, keepdim=True) / count
    return call.value(clause.expr("gain")) * centred / (variance + 1e-8).sqrt() + call.value(clause.expr("shift"))


def sinkhorn(rows: Rows) -> Tensor:
    """Row and column log-normalisations in turn, starting with rows; one iteration is softmax.

    Rows sum to 1 after an odd count. Columns are brought to sum to Q / K.
    """
    log_p = rows.scores.masked_fill(~rows.visible, -torch.inf)
    columns_sum = math.log(rows.scores.shape[-2] / rows.scores.shape[-1])
    for iteration in range(rows.spec.normalizer.count(0)):
        axis = -2 if iteration % 2 else -1
        total = torch.logsumexp(log_p, axis, keepdim=True)
        log_p = log_p - total.masked_fill(total.isinf(), 0.0) + (columns_sum if iteration % 2 else 0.0)
    return log_p.exp()


def orthogonal(rows: Rows) -> Tensor:
    """Scores = U R; weights = U * U, doubly stochastic. Square and unmasked only."""
    return torch.linalg.qr(rows.scores)[0].square()


def birkhoff(rows: Rows) -> Tensor:
    """The doubly stochastic matrix nearest to the scores, by Dykstra's projections: n rounds of sums, then signs.

    Columns are brought to sum to Q / K. Unmasked only.
    """
    height, width = rows.scores.shape[-2:]
    x, carried = rows.scores, torch.zeros_like(rows.scores)
    for _ in range(rows.spec.normalizer.count(0)):
        over_rows = x.sum(-1, keepdim=True) - 1
        over_columns = x.sum(-2, keepdim=True) - height / width
        x = x - over_rows / width - over_columns / height + over_rows.sum(-2, keepdim=True) / (height * width)
        x, carried = (x + carried).clamp(min=0), (x + carried).clamp(max=0)
    return x


def polynomial(rows: Rows) -> Tensor:
    """f(s) / sum f(s), f the Taylor polynomial of exp of the given order."""
    term = weights = torch.ones_like(rows.scores)
    for n in range(1, rows.spec.normalizer.count(0) + 1):
        term = term * rows.scores / n
        weights = weights + term
    weights = weights.masked_fill(~rows.visible, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def kolmogorov(rows: Rows) -> Tensor:
    """weights = lift (sum_jg cos_pjg cos(g s_j) + sin_pjg sin(g s_j))_p: a learned function of the whole row, of fixed length.

    cos, sin [H|1, R, K, G], lift [H|1, K, R]. Hidden keys enter the row function with nothing.
    """
    clause, call = rows.spec.normalizer, rows.call
    cos, sin, lift = (call.operand(clause, name) for name in ("cos", "sin", "lift"))
    wave = torch.arange(1, cos.shape[-1] + 1, dtype=call.dtype, device=rows.scores.device)
    phase = rows.scores.masked_fill(~rows.visible, 0.0)[..., None] * wave
    seen = rows.visible[..., None]
    # The heads of a shared table are one: expand before the contraction names them.
    cos, sin, lift = (x.expand(rows.scores.shape[1], *x.shape[1:]) for x in (cos, sin, lift))
    features = torch.einsum("bhqkg,hrkg->bhqr", phase.cos() * seen, cos) + torch.einsum(
        "bhqkg,hrkg->bhqr", phase.sin() * seen, sin
    )
    return torch.einsum("bhqr,hkr->bhqk", features, lift)


def routed(rows: Rows) -> Tensor:
    """Each centroid takes its n nearest queries and keys by cosine; softmax inside; a query averages over its centroids.

    centroids [H|1, C, D]. With shared(qk) the queries' list is the keys'. A query that no centroid takes gets zero.
    """
    clause, call = rows.spec.normalizer, rows.call
    centroids = call.operand(clause, "centroids")
    centroids = centroids.expand(rows.q.shape[1], *centroids.shape[-2:])
    one_list = rows.spec.shared is not None and rows.spec.shared.word(0) in ("qk", "qkv")

    def members(x: Tensor) -> Tensor:
        near = centroids @ UNITS["l2"](x).transpose(-1, -2)  # [B, H, C, L]
        chosen = near.topk(min(clause.count(0), x.shape[-2]), -1).indices
        return torch.zeros_like(near, dtype=torch.bool).scatter(-1, chosen, True)

    keys = members(rows.k)
    queries = keys if one_list else members(rows.q)
    shown = queries[..., :, None] & keys[..., None, :] & rows.visible[:, :, None]  # [B, H, C, Q, K]
    scores = rows.scores[:, :, None].masked_fill(~shown, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0).sum(2)
    return weights / queries.sum(2).clamp(min=1)[..., None]


def linear(rows: Rows) -> Tensor:
    """Features' products, divided by their sum (at least `floor`, plus `eps`) unless denominator=none.

    magnitude: (1 + 1/z) s_ij - z / K with z the sum: rows sum to 1, and their spread grows with z.
    """
    clause = rows.spec.normalizer
    how = clause.word("denominator")
    weights = rows.scores.masked_fill(~rows.visible, 0.0)
    if how == "none":
        return weights
    summed = rows.scores if rows.denominators is None else rows.denominators
    total = summed.masked_fill(~rows.visible, 0.0).sum(-1, keepdim=True)
    if how == "magnitude":
        count = rows.visible.sum(-1, keepdim=True).clamp(min=1)
        return (1 + 1 / torch.where(total == 0, torch.ones_like(total), total)) * weights - total / count
    if clause.number("floor") > 0:
        total = total.clamp(min=clause.number("floor"))
    total = total + rows.call.value(clause.expr("eps"))
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def scores_themselves(rows: Rows) -> Tensor:
    """The scores are the weights: static maps, position-only attention, and what a recurrence read."""
    return rows.scores


NORMALIZERS: dict[str, Callable[[Rows], Tensor]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "signed_softmax": signed_softmax,
    "zscore": zscore,
    "sinkhorn": sinkhorn,
    "orthogonal": orthogonal,
    "birkhoff": birkhoff,
    "polynomial": polynomial,
    "kolmogorov": kolmogorov,
    "routed": routed,
    "linear": linear,
    "recurrent": scores_themselves,
    "weights": scores_themselves,
}
