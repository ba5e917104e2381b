"""What a live model is optimised on: batches of tokens, made of texts, of tensors, or of dictionaries.

["def fib(n): …", …], tokenizer   ->   [{"input_ids": [8, 256], "attention_mask": [8, 256]}, …]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import InputMismatch

LONGEST, ROWS = 256, 8  # tokens of a calibration text that are read, and texts of one batch
GIVE = "Give calibration=texts with tokenizer=tok, or calibration=batches of input_ids."


def prompt(model: Any, rows: int = 2, length: int = 128) -> dict[str, Tensor]:
    """Random tokens, the same each time; an exact plan needs no others."""
    size = int(model.config.get_text_config().vocab_size)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    ids = torch.randint(0, size, (rows, min(length, longest)), generator=torch.Generator().manual_seed(0))
    return masked(ids.to(next(model.parameters()).device))


def masked(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def token_batches(given: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of input_ids and attention_mask from texts, tensors of tokens, or dictionaries. Raises InputMismatch.

    Of a text its first LONGEST tokens count; texts of that length are read ROWS at a time, shorter ones alone, so that none is padded.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, (Iterable, Tensor)):
        raise InputMismatch("calibration is no list of texts or batches", where=type(given).__name__, next_move=GIVE)
    items = [given] if isinstance(given, (Tensor, Mapping)) else list(given)
    if items and all(isinstance(x, str) for x in items):
        if tokenizer is None:
            raise InputMismatch("calibration holds texts, and there is no tokenizer", next_move="Give tokenizer=tok.")
        return of_equal_length([tokenizer(text)["input_ids"][:LONGEST] for text in items])
    made = []
    for i, item in enumerate(items):
        found = item.get("input_ids") if hasattr(item, "keys") else item
        if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point():
            raise InputMismatch("a batch holds no input_ids [B, L]", where=f"calibration batch {i}", next_move=GIVE)
        mask = item.get("attention_mask") if hasattr(item, "keys") else None
        made.append(masked(found, mask))
    if not made:
        raise InputMismatch("calibration is empty", next_move=GIVE)
    return made


def of_equal_length(rows: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        if len(row) > 1:
            by_length.setdefault(len(row), []).append(row)
    if not by_length:
        raise InputMismatch("no calibration text has two tokens", next_move="Give longer texts.")
    found = [torch.tensor(part) for _, part in sorted(by_length.items(), reverse=True)]
    return [masked(ids) for part in found for ids in part.split(ROWS)]
