"""Train a small language model of Python source, on whatever source this machine has: real weights to judge approximations by.

    python examples/train_reference_lm.py --out lm --minutes 8                    on a GPU: 12 million parameters
    python examples/train_reference_lm.py --out lm --minutes 60 --size small      on a CPU: 6 million

The data are the standard library and the installed packages; every fiftieth file, by the hash of its contents, is held out. Llama-style:
grouped queries, head_dim 64, 8 layers, a context of 4,096, byte-level BPE. Weights are kept as float16 (at most 25 MB).
With --present FOLDER the model is written only if it is better than the one in that folder, in nats per byte of the same held-out text
(a byte, because tokenizers differ).
"""

from __future__ import annotations

import argparse
import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from training import device_named, train

HELD_OUT = 50  # one file of so many
LARGEST = 25_000_000  # bytes of weights
CONTEXT = 4096
BOUNDARY = "<|document|>"  # token 0, before each document
SHORTEST, LONGEST = 500, 200_000  # bytes of a file
console = Console(stderr=True, width=140)


@dataclass(frozen=True)
class Size:
    """hidden, intermediate, layers; query and key heads of head_dim."""

    hidden: int
    intermediate: int
    layers: int
    heads: tuple[int, int]
    head_dim: int = 64


SIZES = {
    "full": Size(384, 768, 8, (6, 2)),  # 11.8 million parameters with 4,096 tokens
    "small": Size(256, 512, 8, (4, 2)),  # 5.8 million
    "tiny": Size(64, 64, 2, (2, 1), 32),  # for tests
}


def folders() -> list[Path]:
    """The standard library and the installed packages of this Python."""
    paths = sysconfig.get_paths()
    return sorted({Path(paths["stdlib"]), Path(paths["purelib"]), Path(paths["platlib"]), *map(Path, site.getsitepackages())})


def documents(places: Iterable[Path], limit: int | None = None) -> tuple[list[str], list[str]]:
    """(to train on, held out): Python files by their contents, each once, in an order that only their hashes decide."""
    found: dict[str, str] = {}
    for path in (p for place in places for p in place.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if SHORTEST <= len(text.encode()) <= LONGEST:
            found[hashlib.sha256(text.encode()).hexdigest()] = text
    chosen = sorted(found)[:limit]
    training, held_out = [], []
    for key in chosen:
        (held_out if int(key[-8:], 16) % HELD_OUT == 0 else training).append(found[key])
    return training, held_out


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE; token 0 stands before each document."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOUNDARY], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return made


def encoded(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All documents in a row, uint16, each after token 0."""
    parts = [np.array([0, *found.ids], np.uint16) for found in tokenizer.encode_batch(list(texts))]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def model_of(size: Size, vocabulary: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads[0], num_key_value_heads=size.heads[1], head_dim=size.head_dim,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def windows(tokens: np.ndarray, length: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Random windows [batch, length] without end. Raises ValueError where there are fewer tokens than one window."""
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are fewer than one window of {length}: give more files or a shorter --length")
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(tokens) - length, batch)
        rows = np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
        yield torch.from_numpy(rows).to(device, non_blocking=True)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


@torch.no_grad()
def per_byte(model: nn.Module, tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> float:
    """Mean loss in nats per byte of the beginnings of documents, each cut to `length` tokens."""
    device = next(model.parameters()).device
    nats = size = 0.0
    for text in texts:
        ids = tokenizer.encode(text).ids[: length - 1]
        tokens = torch.tensor([[0, *ids]], device=device)
        nats += float(loss(model, tokens)) * len(ids)
        size += len(tokenizer.decode(ids).encode())
    return nats / max(size, 1.0)


def present_loss(folder: Path, texts: Sequence[str], length: int, device: torch.device) -> float:
    """What the model in a folder loses on the same text; infinite where there is none."""
    if not (folder / "model.safetensors").exists():
        return float("inf")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    return per_byte(model, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), texts, length)


def write(folder: Path, model: nn.Module, tokenizer: tokenizers.Tokenizer, held_out: np.ndarray) -> None:
    """The model in float16, its tokenizer, and held-out tokens. Raises ValueError where the weights are too large."""
    half = model.cpu().half()
    size = sum(p.nbytes for p in half.parameters())
    if size > LARGEST:
        raise ValueError(f"the weights take {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}: choose a smaller --size")
    half.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "eval_tokens.npy", held_out[:400_000])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the model is written to")
    parser.add_argument("--present", type=Path, help="folder of a model that this one has to beat")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training window")
    parser.add_argument("--batch", type=int, help="windows of a step; default 64 on a GPU, 8 on a CPU")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--files", type=int, help="use only so many files")
    parser.add_argument("--folder", type=Path, action="append", help="where the files are; default: this Python's own")
    parser.add_argument("--device")
    given = parser.parse_args(arguments)
    device = device_named(given.device)
    training, held_out = documents(given.folder or folders(), given.files)
    if not held_out:
        parser.error(f"of {len(training)} files none is held out to judge by: give more files")
    tokenizer = train_tokenizer(training[:: max(1, len(training) // 4000)], given.vocabulary)
    tokens, judged = encoded(tokenizer, training), encoded(tokenizer, held_out)
    model = model_of(SIZES[given.size], tokenizer.get_vocab_size()).to(device)
    count = sum(p.numel() for p in model.parameters())
    console.print(f"{len(training)} files, {len(tokens):,} tokens, {len(held_out)} held out; {count:,} parameters on {device}")
    steps, minutes = given.steps, None if given.steps is not None else given.minutes
    batches = windows(tokens, given.length, given.batch or (64 if device.type == "cuda" else 8), device)
    # The last tenth on windows of the whole context, so that every position has been trained on.
    train(model, batches, loss, steps=steps, minutes=minutes and 0.9 * minutes)
    longest = min(CONTEXT, len(tokens) - 1)
    long = windows(tokens, longest, max(1, (given.batch or 16) * given.length // longest), device)
    train(model, long, loss, steps=None if steps is None else max(1, steps // 10), minutes=minutes and 0.1 * minutes, peak=2e-4)
    texts = held_out[:64]
    mine = per_byte(model, tokenizer, texts, given.length)
    other = present_loss(given.present, texts, given.length, device) if given.present else float("inf")
    print(f"{mine:.4f} nats per byte of {len(texts)} held-out files" + f", the present model {other:.4f}" * bool(given.present))
    if mine >= other:
        print("not better: nothing is written")
        return
    write(given.out, model, tokenizer, judged)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
