"""The small trained models in examples/models and their data, for examples, tests and benchmarks: one way to load each.

    model, windows = code_lm(), code_windows(32, 1024)          recall_model(), recall_task.recall_batch(…)

What they can and cannot show is in examples/models/README.md.  python examples/trained_models.py prints the numbers that stand there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from recall_task import recall_batch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "models"
BUCKETS = ((0, 64), (64, 256), (256, 512), (512, 1024))  # positions
BOUNDARY = 0  # the token before each document


def code_lm(attention: str = "sdpa") -> transformers.LlamaForCausalLM:
    """The language model of Python source, float32, in evaluation mode."""
    return loaded("code-lm", attention)


def recall_model(attention: str = "sdpa") -> transformers.LlamaForCausalLM:
    """The model of `recall_task`, float32, in evaluation mode."""
    return loaded("recall", attention)


def loaded(name: str, attention: str) -> transformers.LlamaForCausalLM:
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.LlamaForCausalLM
    return kind.from_pretrained(FOLDER / name, dtype=torch.float32, attn_implementation=attention).eval()


def code_tokens() -> Tensor:
    """All held-out tokens, int64, each document after a BOUNDARY."""
    return torch.from_numpy(np.load(FOLDER / "code-lm" / "eval_tokens.npy").astype(np.int64))


def code_windows(count: int, length: int) -> Tensor:
    """The beginnings of `count` held-out documents, [count, length]: one of each, so that they are independent samples.

    Raises ValueError where fewer documents are so long: 62 have 512 tokens, 57 have 1,024, 45 have 2,048, 33 have 4,096.
    """
    tokens = code_tokens()
    starts = (tokens == BOUNDARY).nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([len(tokens)])])
    long_enough = starts[ends - starts >= length]
    if len(long_enough) < count:
        raise ValueError(f"only {len(long_enough)} held-out documents have {length} tokens, not {count}")
    return torch.stack([tokens[start : start + length] for start in long_enough[:count].tolist()])


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor, batch: int = 4, seen: Tensor | None = None) -> Tensor:
    """Loss of each next token in nats, [count, length - 1]. seen: bool [length, length], which keys a query may read."""
    device = next(model.parameters()).device
    made = []
    for part in windows.to(device).split(batch):
        mask = None if seen is None else seen.to(device)[None, None].expand(len(part), 1, -1, -1)
        logits = model(part, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        made.append(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").cpu())
    return torch.cat(made)


def loss_by_position(model: nn.Module, windows: Tensor) -> dict[tuple[int, int], float]:
    """Mean loss in nats of the tokens at each range of positions that the windows reach."""
    found = losses(model, windows)
    return {(low, high): float(found[:, low:high].mean()) for low, high in BUCKETS if found.shape[1] >= high - 1}


@torch.no_grad()
def accuracy(model: nn.Module, pairs: int, length: int, count: int = 16, seed: int = 0) -> float:
    """Share of right answers in `count` sequences of `recall_task`."""
    device = next(model.parameters()).device
    right = []
    for i in range(count):  # one by one: long ones take memory
        made = recall_batch(1, pairs, length, seed * count + i)
        right.append(made.accuracy(model(made.tokens.to(device), use_cache=False).logits.cpu()))
    return float(torch.cat(right).mean())


def sinks_and_window(length: int, sinks: int, window: int) -> Tensor:
    """Which keys a causal query sees: the first few and the last few, bool [length, length]."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    return (k <= q) & ((k < sinks) | (q - k < window))


@contextlib.contextmanager
def without_attention(model: nn.Module, layer: int) -> Iterator[None]:
    """The model with one attention that adds nothing to its stream."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.data
    held = weight.clone()
    weight.zero_()
    yield
    weight.copy_(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=57)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    model, windows = code_lm(), code_windows(given.windows, given.length)
    print(f"code-lm, the first {given.length} tokens of {given.windows} held-out documents:")
    for (low, high), loss in loss_by_position(model, windows).items():
        print(f"{low:5}-{high - 1:<5} {loss:.2f} nats")
    whole = losses(model, windows).mean()
    for sinks, window in ((4, 256), (4, 64), (4, 16), (0, 16)):
        more = losses(model, windows, seen=sinks_and_window(given.length, sinks, window)).mean() - whole
        print(f"{sinks} sinks and a window of {window}: {more:+.3f} nats")
    for layer in range(len(model.model.layers)):
        with without_attention(model, layer):
            print(f"without the attention of layer {layer}: {losses(model, windows).mean() - whole:+.3f} nats")
    recaller = recall_model()
    for pairs, length in ((8, 64), (16, 128), (32, 256), (32, 512), (32, 1024), (32, 1900)):
        print(f"recall, {pairs} pairs among {length} tokens: {accuracy(recaller, pairs, length):.3f}")


if __name__ == "__main__":
    main()
