"""Exact folds, each alone, in both runtimes and in live models: what the cost model predicts of each, and what it takes measured in turn
with what was there.

Random weights in the shapes of a small encoder (BERT, 384 wide), a small Llama (192 wide, 6 heads on 2), a small GPT-2 (256 wide), a
model of two query heads on one key head, all of its width, and one of windows with a table of relative positions (Swin's, 192 wide), with
gains and biases that are not 1 and 0, for one token, a sentence, and batches of them; windows have 49 places. Times of whole models, of
those that generate as their own modules compute them too.

    python benchmarks/fold.py [--seconds 0.6] [--models "wide head 256,windows 192"] [--runtimes live]

With --models and --runtimes the rows of the others stay as the last run left them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import harness
import torch
import transformers
from folding.random_models import PLACES, Stack, WideHead, Windowed
from torch import Tensor, nn

from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.model import generates
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host, Refusal
from attnopt.passes import ALL, Pass
from attnopt.plan.folding import Folding, edited, is_fold, offered
from attnopt.plan.live.folding import LiveFolding
from attnopt.plan.options.groups import Grouping
from attnopt.plan.timing.timing import counted, in_turn

RUNTIMES = ("torch", "onnxruntime", "live")
WORDS = 2000
SHAPES = ((1, 1), (1, 16), (1, 128), (8, 128))
SHARED = {"vocab_size": WORDS, "attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 1}


def encoder() -> nn.Module:
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return transformers.BertModel(transformers.BertConfig(**sizes, **SHARED))


def llama() -> nn.Module:
    sizes = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SHARED))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=256, n_layer=4, n_head=4, **SHARED))


def wide_head() -> nn.Module:
    return Stack(WideHead, 256, 4, WORDS)


def windows() -> nn.Module:
    return Stack(Windowed, 192, 4, WORDS)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT 384": encoder,
    "Llama 192": llama,
    "GPT-2 256": gpt2,
    "wide head 256": wide_head,
    "windows 192": windows,
}
FIXED = {"windows 192": ((1, PLACES), (8, PLACES), (64, PLACES))}  # shapes where the length is one


@dataclass(frozen=True)
class Row:
    """One fold of one model at one shape: predicted and measured shares of the time before, seconds before, largest difference."""

    model: str
    runtime: str
    fold: str
    shape: str
    predicted: float | None = None
    measured: float | None = None
    seconds: float | None = None
    difference: float | None = None
    refused: str = ""


def hosts(name: str) -> Iterator[tuple[str, Host]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(0, WORDS, (2, PLACES if name in FIXED else 16))
    given: dict[str, object] = {"input_ids": ids}
    if not isinstance(model, Stack):
        given["attention_mask"] = torch.ones_like(ids)
        given |= {} if isinstance(model, transformers.BertModel) else {"use_cache": False}
    host = FxHost.from_captured(capture(model, given))
    yield "torch", host
    yield "onnxruntime", OnnxHost.from_model(host.to_onnx())
    if generates(model):
        yield "live", ModuleHost.open(model, given)


def folding(runtime: str, host: Host, given: Mapping[str, Tensor]) -> Folding:
    """What judges folds at the shape of these inputs."""
    target, sizes = load_target("cpu")[0], ((1.0, host.graph.sizes(given)),)
    if runtime == "live":
        return LiveFolding("model", target, "torch", (), sizes, inputs={**given, "use_cache": False})
    return Folding("model", target, runtime, (), sizes)


def inputs(host: Host, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))
    return {v.name: ids if "ids" in v.name else torch.ones_like(ids) for v in host.graph.inputs}


def rows(name: str, runtime: str, host: Host, rewrite: Pass, seconds: float) -> Iterator[Row]:
    grouping = Grouping(host)
    moves = offered(grouping, rewrite)
    if not moves:
        refused = (rewrite.propose(g, None) for g in grouping.of(rewrite.per))
        yield Row(
            name, runtime, rewrite.name, "", refused=next((r.reason for r in refused if isinstance(r, Refusal)), "no group")
        )
        return
    folded = edited(host, moves)
    made = folding(runtime, host, inputs(host, 2, 16)).held(host, folded)
    if isinstance(made, Refusal):
        yield Row(name, runtime, rewrite.name, "", refused=made.reason)
        return
    for batch, length in FIXED.get(name, SHAPES):
        given = inputs(host, batch, length)
        judge = folding(runtime, host, given)
        before, after = judge.runner(host), judge.runner(made)
        gap = max(float((a - b).abs().max()) for a, b in zip(before(given), after(given), strict=True))
        share = judge.predicted(folded) / judge.predicted(host)
        times = in_turn({"before": partial(before, given), "after": partial(after, given)}, seconds=seconds, clock=counted())
        ratio, median = times["after"].ratio(times["before"]), times["before"].median
        yield Row(name, runtime, rewrite.name, f"{batch} x {length}", share, ratio, median, gap)


def line(row: Row) -> list[str]:
    if row.refused:
        return [row.model, row.runtime, row.fold, "", "", "", "", f"refused: {row.refused}"]
    return [row.model, row.runtime, row.fold, row.shape, f"{row.predicted:.3f}", f"{row.measured:.3f}",
            f"{(row.seconds or 0.0) * 1e3:.2f} ms", f"{row.difference:.1e}"]  # fmt: skip


def before(names: list[str], runtimes: list[str]) -> list[Row]:
    """The rows of the other models and runtimes that the last run left."""
    return [r for r in harness.kept("fold", Row) if r.model in MODELS and not (r.model in names and r.runtime in runtimes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.6, help="of timing, for each fold and shape")
    parser.add_argument("--models", default=",".join(MODELS), help="names with commas between")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="names with commas between")
    given = parser.parse_args()
    names, runtimes = given.models.split(","), given.runtimes.split(",")
    for asked, known in ((names, MODELS), (runtimes, RUNTIMES)):
        if unknown := [n for n in asked if n not in known]:
            parser.error(f"'{unknown[0]}' is none of {', '.join(known)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = harness.busy_share()
    folds = [p for p in ALL if is_fold(p)]
    found = before(names, runtimes)
    for name in names:
        for runtime, host in hosts(name):
            for rewrite in folds if runtime in runtimes else ():
                print(f"{name}, {runtime}, {rewrite.name}", flush=True)
                found += rows(name, runtime, host, rewrite, given.seconds)
    found.sort(key=lambda r: (list(MODELS).index(r.model), RUNTIMES.index(r.runtime)))
    columns = ["model", "runtime", "fold", "batch x length", "predicted", "measured", "before", "largest difference"]
    table = harness.markdown(columns, [line(r) for r in found])
    notes = [
        f"{torch.get_num_threads()} threads; shares of the time before, medians of paired ratios; below 1 is faster",
        f"other processes used {busy:.2f} cores when it began"
        + ("; on one thread only this process's own time counts" * (busy > 0.3)),
        "a fold is taken where it is predicted to save 1 % and measured to save more than noise (3 %)",
    ]
    print(table, *notes, sep="\n")
    path = harness.save("fold", found, notes)
    path.with_suffix(".md").write_text(table + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
