"""Optimise a model with sliding-window attention on a long text, and print what it gained.

    Mistral in small (random weights, window 512)   ->   ONNX   ->   local attention in standard operators, linear in the length

Run by `make demo`. Nothing is downloaded: the time of attention does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnopt
from attnopt.plan.timing.timing import in_turn

WINDOW, TOKENS = 512, 8192


def mistral(layers: int, window: int = WINDOW, attention: str = "eager") -> transformers.MistralModel:
    """Eight query heads on two key heads, 256 wide."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, sliding_window=window, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return transformers.MistralModel(config).eval()


def tokens(length: int, batch: int = 1) -> dict[str, Tensor]:
    """Random ids; the mask says that all of them are real, as the model reads one anyway."""
    ids = torch.randint(0, 1000, (batch, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(model: transformers.PreTrainedModel, path: Path) -> Path:
    """An ordinary ONNX export with dynamic batch and length, by torch's own exporter."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    example = tokens(64, batch=2)
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), path, kwargs=example, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False,
            output_names=["hidden"],
        )  # fmt: skip
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the models are written")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    original = export(mistral(given.layers), given.folder / "window.onnx")
    console.print(f"$ attnopt inspect {original}")
    inputs = tokens(given.tokens)
    console.print(attnopt.inspect(original, inputs))
    fast = attnopt.optimize(original, inputs)
    path = fast.export(given.folder / "window-exact.onnx")
    console.print(f"\nexact: {path}")
    console.print(fast.report)
    calls = {"original": attnopt.load(original), "exact": attnopt.load(path)}
    table = Table("tokens", "original", "exact", "speed", box=None, pad_edge=False)
    for length in (given.tokens // 8, given.tokens // 4, given.tokens // 2):
        arrays = {name: tensor.numpy() for name, tensor in tokens(length).items()}
        times = in_turn(
            {name: (lambda call=call, arrays=arrays: call(arrays)) for name, call in calls.items()}, seconds=0.5, least=3
        )
        before, after = (times[name].median for name in calls)
        table.add_row(str(length), f"{before:.2f} s", f"{after:.2f} s", f"{1 / times['exact'].ratio(times['original']):.2f}x")
    if fast.report.speedup:  # measured by optimize itself, on this length
        before, after = fast.report.seconds_before, fast.report.seconds_after
        table.add_row(str(given.tokens), f"{before:.2f} s", f"{after:.2f} s", f"{fast.report.speedup:.2f}x")
    console.print(f"\nwindow {WINDOW}, {given.layers} layers, {torch.get_num_threads()} threads, onnxruntime:")
    console.print(table)


if __name__ == "__main__":
    main()
