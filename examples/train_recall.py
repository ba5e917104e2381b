"""Train the small model that recalls exactly: the judge of everything that drops context.

    python examples/train_recall.py --out recall            (the task is made on the way: nothing is downloaded)

Short sequences come first, because the circuit that recalls forms there and then stretches. Prints the accuracy by length; the
weights in examples/models/recall were made like this.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from recall_task import BOS, VOCABULARY, RecallBatch, recall_batch
from rich.console import Console
from rich.table import Table
from torch import nn
from training import device_named, train

LENGTHS = ((8, 64), (16, 128), (32, 256), (32, 512), (32, 1024), (32, 1900))  # pairs, length of the context
STAGES = (
    (0.0, (8, 64)),
    (0.25, (16, 128)),
    (0.5, (32, 256)),
    (0.7, (32, 512)),
    (0.85, (32, 1024)),
)  # from this share of the steps


def recaller(hidden: int = 128, layers: int = 3, heads: int = 4) -> transformers.LlamaForCausalLM:
    """A Llama in small: two query heads share a key head, head_dim 32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=hidden // heads, max_position_embeddings=4096,
        bos_token_id=BOS, eos_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(steps: int, tokens: int, device: torch.device) -> Iterator[RecallBatch]:
    """Batches of about `tokens` tokens; lengths grow by STAGES and shorter ones keep coming back."""
    for step in range(steps):
        open_now = [task for start, task in STAGES if step >= start * steps]
        pairs, length = open_now[-1] if step % 2 else open_now[step // 2 % len(open_now)]
        made = recall_batch(max(1, tokens // (length + 4 * pairs)), pairs, length, seed=1000 + step)
        yield RecallBatch(*(x.to(device) for x in (made.tokens, made.asked, made.answers, made.places)))


def loss(model: nn.Module, batch: RecallBatch) -> torch.Tensor:
    return batch.loss(model(batch.tokens, use_cache=False).logits)


@torch.no_grad()
def accuracy(model: nn.Module, pairs: int, length: int, count: int = 16, seed: int = 0) -> float:
    """Share of right answers over sequences that no training has seen."""
    device = next(model.parameters()).device
    made = recall_batch(count, pairs, length, seed)
    right = [
        RecallBatch(tokens, made.asked, answers, places).accuracy(model(tokens.to(device), use_cache=False).logits.cpu())
        for tokens, answers, places in zip(made.tokens.split(4), made.answers.split(4), made.places.split(4), strict=True)
    ]
    return float(torch.cat(right).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that the model is written to")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--tokens", type=int, default=16_384, help="of one batch")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--longest", type=int, default=1900, help="the longest context that is judged")
    parser.add_argument("--device")
    given = parser.parse_args(arguments)
    device = device_named(given.device)
    model = recaller(given.hidden, given.layers).to(device)
    train(model, batches(given.steps, given.tokens, device), loss, steps=given.steps, peak=2e-3)
    table = Table("pairs", "length", "accuracy", box=None, pad_edge=False)
    for pairs, length in LENGTHS:
        if length <= given.longest:
            table.add_row(str(pairs), str(length), f"{accuracy(model, pairs, length):.3f}")
    Console(width=140).print(table)
    model.cpu().save_pretrained(given.out)


if __name__ == "__main__":
    main()
