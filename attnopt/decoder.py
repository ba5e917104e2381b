"""Export a decoder of transformers for runners that keep the cache themselves: one graph for the prompt, one for each token after it.

export_decoder(model, "fast/", target="cpu")   ->   fast/prefill.onnx, fast/decode.onnx, fast/config.json
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.api import optimize
from attnopt.errors import InputMismatch, OutputNotWritable, UnsupportedFormat
from attnopt.hosts.decoder.naming import named
from attnopt.hosts.decoder.phases import Phase, last_token, phases, prompt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.module.traceable import traceable
from attnopt.optimized import Optimized
from attnopt.report.data import Report

FORMATS = ("onnx", "pt2")
EXAMPLE = (2, 16)  # texts and tokens that a graph is traced with, where no data are given


@dataclass(frozen=True)
class Decoder:
    """What was written, and what was done to each graph. layers: pairs of keys and values in the cache."""

    prefill: Path
    decode: Path
    layers: int
    reports: tuple[Report, Report]

    def __str__(self) -> str:
        return "\n".join(f"{path}\n{report}" for path, report in zip((self.prefill, self.decode), self.reports, strict=True))


def export_decoder(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "onnx",
    example_inputs: Mapping[str, Tensor] | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> Decoder:
    """Write the two graphs of generation, each optimised as `optimize` would: `prefill` reads a prompt, `decode` one token more.

    model: a …ForCausalLM of transformers whose layers all keep keys and values, live ones too; it is not touched.
    format: "onnx" (inputs input_ids, attention_mask, position_ids, past_key_values.N.key and .value; outputs logits, present.N.key and
    .value), or "pt2", whose decode takes past_key_values as pairs of tensors.
    example_inputs: input_ids [B, L], and an attention_mask [B, L] where texts are padded on the left; default: random tokens.
    calibration: more of the same, for a budget; the last token of each text, after all others, is what decode is judged by.
    options: those of `optimize` (target, budget, passes, …), for both graphs.

    Beside the graphs stand the model's config.json and generation_config.json. examples/generate_onnx.py is a loop over the two.
    Raises UnsupportedFormat for a model or a format that cannot be exported so, OutputNotWritable, and what `optimize` raises.
    """
    if format not in FORMATS:
        raise UnsupportedFormat(f"'{format}' is none of {', '.join(FORMATS)}", next_move="Leave it out for ONNX.")
    model = traceable(model)
    both = phases(model)
    given = prompt(model, example_inputs if example_inputs is not None else random_tokens(model))
    if given["input_ids"].shape[1] < 3:
        raise InputMismatch(
            "a prompt of two tokens or fewer leaves no past to trace", where="input_ids", next_move="Give three or more."
        )
    batches = [prompt(model, batch) for batch in calibration] if calibration is not None else None
    step = last_token(both[0], given)
    inputs = (given, step)
    data = (batches, None if batches is None else [last_token(both[0], batch) for batch in batches])
    made = [
        graph(phase, named_inputs, data[i], format, decodes=bool(i), layers=len(step["past_key_values"]), **options)
        for i, (phase, named_inputs) in enumerate(zip(both, inputs, strict=True))
    ]
    first, second = written(Path(folder), model, made, format)
    return Decoder(first, second, len(step["past_key_values"]), (made[0].report, made[1].report))


def written(place: Path, model: nn.Module, made: Sequence[Optimized], format: str) -> tuple[Path, Path]:
    """Both graphs and the configurations, all or nothing: they are written beside their places and moved when all are there."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=place, prefix="."))
    except OSError as failure:
        raise OutputNotWritable(f"'{place}' cannot be written: {failure.strerror}", next_move="Choose another folder.") from None
    try:
        names = [fast.export(beside / f"{name}.{format}").name for name, fast in zip(("prefill", "decode"), made, strict=True)]
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None:
                config.save_pretrained(beside)
        for file in sorted(beside.iterdir()):
            os.replace(file, place / file.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place / names[0], place / names[1]


def graph(
    phase: Phase,
    inputs: Mapping[str, Any],
    data: list[dict[str, Any]] | None,
    format: str,
    *,
    decodes: bool,
    layers: int,
    **options: Any,
) -> Optimized:
    """One phase, optimised in the host of its format."""
    free = torch.export.Dim.AUTO
    axes = {name: {0: free, 1: free} for name in inputs if name != "past_key_values"}
    if decodes:
        axes |= {"input_ids": {0: free}, "position_ids": {0: free}}
        axes = {name: axis for name, axis in axes.items() if name in inputs}
        axes["past_key_values"] = tuple(({0: free, 2: free}, {0: free, 2: free}) for _ in range(layers))  # type: ignore[assignment]
    if format == "pt2":
        return optimize(phase, dict(inputs), dynamic_shapes=axes, calibration=data, **options)
    proto = named(FxHost.from_captured(capture(phase, dict(inputs), axes)).to_onnx(), layers, decodes=decodes)
    return optimize(proto, flat(inputs), calibration=None if data is None else [flat(batch) for batch in data], **options)


def flat(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs by the names that they have in an ONNX graph."""
    past = inputs.get("past_key_values", ())
    held = {
        f"past_key_values.{i}.{part}": x for i, pair in enumerate(past) for part, x in zip(("key", "value"), pair, strict=True)
    }
    return {name: x for name, x in inputs.items() if name != "past_key_values"} | held


def random_tokens(model: nn.Module) -> dict[str, Tensor]:
    """Two texts; the second is padded, so that a graph keeps its mask."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, EXAMPLE, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}
