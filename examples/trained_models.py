"""The small trained models in examples/models and their data, for examples, tests and benchmarks: one way to load each.

    model, windows = code_lm(), code_windows(32, 1024)          recall_model(), recall_task.recall_batch(…)

What they can and cannot show is in examples/models/README.md.  python examples/trained_models.py prints its table of losses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
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
def losses(model: nn.Module, windows: Tensor, batch: int = 4) -> Tensor:
    """Loss of each next token in nats, [count, length - 1]."""
    device = next(model.parameters()).device
    made = []
    for part in windows.to(device).split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        made.append(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").cpu())
    return torch.cat(made)


def loss_by_position(model: nn.Module, windows: Tensor) -> dict[tuple[int, int], float]:
    """Mean loss in nats of the tokens at each range of positions that the windows reach."""
    found = losses(model, windows)
    return {(low, high): float(found[:, low:high].mean()) for low, high in BUCKETS if found.shape[1] >= high - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=57)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    found = loss_by_position(code_lm(), code_windows(given.windows, given.length))
    print(f"code-lm, the first {given.length} tokens of {given.windows} held-out documents:")
    for (low, high), loss in found.items():
        print(f"{low:5}-{high - 1:<5} {loss:.2f} nats")


if __name__ == "__main__":
    main()
