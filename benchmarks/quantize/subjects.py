"""The two models that are rounded, with data to calibrate on, other data to judge on, and what a loss is.

code-lm   the reference language model      KL(float || rounded) in nats per token, perplexity       one sample is one document
MiniLM    a sentence encoder                1 - cosine of embeddings                                one sample is one text
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import minilm
import trained_models

from attnopt.analysis.calibration import Calibration
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """A mean over independent samples and half the width of its 95 % interval (normal)."""

    mean: float
    half: float

    @classmethod
    def of(cls, samples: Tensor) -> Measured:
        return cls(float(samples.mean()), 1.96 * float(samples.std()) / math.sqrt(len(samples)))

    def __str__(self) -> str:
        return f"{self.mean:.2e} ± {self.half:.0e}"


@dataclass
class Subject:
    """A model with data. score: (its outputs, those of the float model, inputs) -> loss of each sample and, for language, nats of each."""

    name: str
    metric: str
    model: nn.Module
    calibration: Sequence[Batch]
    judged: Sequence[Batch]
    score: Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor | None]]
    folder: Path
    vocabulary: int = 0  # outputs of the head, which is not rounded

    @cached_property
    def torch(self) -> FxHost:
        return FxHost.from_captured(capture(self.model, dict(self.judged[0])))

    @cached_property
    def path(self) -> Path:
        """An ordinary ONNX export."""
        dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in self.judged[0]}
        path = self.folder / f"{self.name}.onnx"
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            self.model, (), path, kwargs=dict(self.judged[0]), dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False
        )  # fmt: skip
        return path

    @cached_property
    def onnx(self) -> OnnxHost:
        return OnnxHost.from_model(self.path)

    @cached_property
    def wanted(self) -> list[Tensor]:
        run = self.torch.runner()
        return [run(batch)[0] for batch in self.judged]

    def data(self, host: Host) -> Calibration:
        return Calibration.of(host.graph, list(self.calibration))

    def loss(self, run: Callable[[Batch], Sequence[Tensor]]) -> tuple[Measured, float | None]:
        """(loss, perplexity) of a runner."""
        losses, nats = [], []
        for batch, wanted in zip(self.judged, self.wanted, strict=True):
            lost, said = self.score(torch.as_tensor(run(batch)[0]), wanted, batch)
            losses.append(lost)
            nats += [said] if said is not None else []
        return Measured.of(torch.cat(losses)), math.exp(float(torch.cat(nats).mean())) if nats else None


class Logits(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = trained_models.code_lm()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def divergence(got: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """KL of each document, and its nats per token."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    said = -q[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (p.exp() * (p - q)).sum(-1).mean(1), said.mean(1)


def apart(got: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, None]:
    return 1 - nn.functional.cosine_similarity(got.double(), wanted.double(), dim=-1), None


def code_lm(folder: Path, quick: bool) -> Subject:
    """Calibrated on 33 documents, judged on the 24 others; 256 tokens of each to judge, 512 to calibrate."""
    windows = trained_models.code_windows(57, 512)
    judged, seen = windows[:24, :256], windows[24:]
    if quick:
        judged, seen = judged[:4, :64], seen[:4, :64]
    batches = [[{"input_ids": x} for x in part.split(4)] for part in (seen, judged)]
    return Subject("code-lm", "KL", Logits().eval(), *batches, divergence, folder, 4096)


def sentence_encoder(folder: Path, quick: bool) -> Subject:
    """Calibrated on 64 paragraphs of documentation, judged on 96 others and the demo's sentences."""
    texts = minilm.calibration_texts(168)
    seen, judged = (texts[::3], [*(t for i, t in enumerate(texts) if i % 3), *minilm.SENTENCES])
    if quick:
        seen, judged = seen[:8], judged[:16]
    batches = [[minilm.tokens(part[i : i + 8], 64) for i in range(0, len(part), 8)] for part in (seen, judged)]
    return Subject("minilm", "1 - cosine", minilm.SentenceEncoder().eval(), *batches, apart, folder)
