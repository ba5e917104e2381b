"""Which keys a query may see when data decides: the selection slot, one function a name, all returning a bool [B, H, Q, K].

Sources: exact top-k; "MoBA" (block_topk: mean-pooled keys, the own block always kept); "Quest" (pages: per-channel bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause

Selector = Callable[[Clause, Tensor, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def top_keys(clause: Clause, q: Tensor, k: Tensor, scores: Tensor, visible: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """`top_keys(n)`: the n visible keys of highest score in each row."""
    keep = min(int(clause.args[0]), scores.shape[-1])  # type: ignore[arg-type]
    chosen = scores.masked_fill(~visible, -torch.inf).topk(keep, -1).indices
    return torch.zeros_like(visible).scatter(-1, chosen, True)


def block_topk(clause: Clause, q: Tensor, k: Tensor, scores: Tensor, visible: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """`block_topk(block, n)`: per query the n key blocks of highest q . mean(k), its own block always among them.

    Blocks that start after the query are never chosen.
    """
    block, keep = (int(a) for a in clause.args)  # type: ignore[arg-type]
    q_len, kv_len = scores.shape[-2:]
    count = -(-kv_len // block)
    members = torch.arange(kv_len, device=q.device) // block
    means = torch.stack([k[:, :, members == i].mean(2) for i in range(count)], 2)
    gate = q @ means.transpose(-1, -2)
    position = torch.arange(q_len, device=q.device)[:, None] + (kv_len - q_len)
    block_ids = torch.arange(count, device=q.device)[None]
    gate = gate.masked_fill(block_ids * block > position, -torch.inf).masked_fill(block_ids == position // block, torch.inf)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, gate.topk(min(keep, count), -1).indices, True)
    return chosen[..., members]


def pages(clause: Clause, q: Tensor, k: Tensor, scores: Tensor, visible: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """`pages(size, n)`: per query the n pages of highest sum_c max(q_c min_c, q_c max_c), an upper bound on its scores."""
    size, keep = (int(a) for a in clause.args)  # type: ignore[arg-type]
    members = torch.arange(k.shape[2], device=q.device) // size
    count = int(members[-1]) + 1
    low = torch.stack([k[:, :, members == i].amin(2) for i in range(count)], 2)
    high = torch.stack([k[:, :, members == i].amax(2) for i in range(count)], 2)
    bound = torch.maximum(q[:, :, :, None] * low[:, :, None], q[:, :, :, None] * high[:, :, None]).sum(-1)
    chosen = torch.zeros_like(bound, dtype=torch.bool).scatter(-1, bound.topk(min(keep, count), -1).indices, True)
    return chosen[..., members]


def blocks(clause: Clause, q: Tensor, k: Tensor, scores: Tensor, visible: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """`blocks(m, n, operand=name)`: an explicit bool operand [B|1, H|1, ceil(Q/m), ceil(K/n)] says which tiles are visited."""
    name = str(clause.get("operand"))
    if name not in operands:
        raise InputMismatch(f"the spec selects by '{name}', which was not given", where=str(clause), next_move=f"Pass {name}=tensor.")
    rows, columns = (int(a) for a in clause.args)  # type: ignore[arg-type]
    tiles = operands[name].bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return tiles[..., : scores.shape[-2], : scores.shape[-1]].expand_as(visible)


SELECTIONS: dict[str, Selector] = {"top_keys": top_keys, "block_topk": block_topk, "pages": pages, "blocks": blocks}
