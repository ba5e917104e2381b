"""Generate text with the two graphs that `attnopt.export_decoder` writes: greedy, any batch, onnxruntime and numpy alone.

python examples/generate_onnx.py fast/ 12 7 99        # numbers of tokens; prints those that follow
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]


class Generator:
    """The two sessions of a folder, and what the tokens so far have left."""

    def __init__(self, folder: Path, options: onnxruntime.SessionOptions | None = None) -> None:
        self.sessions = [
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("prefill", "decode")
        ]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
        self.ends = ends if isinstance(ends, list) else [] if ends is None else [ends]

    def __call__(self, texts: Sequence[Sequence[int]], tokens: int = 32) -> list[list[int]]:
        """Up to so many tokens after each text; a text that ends is filled with its end."""
        longest = max(map(len, texts))
        ids = np.array([[0] * (longest - len(text)) + list(text) for text in texts], dtype=np.int64)
        mask = np.array([[0] * (longest - len(text)) + [1] * len(text) for text in texts], dtype=np.int64)
        logits, present = self.run(0, ids, mask, np.maximum(mask.cumsum(1) - 1, 0), {})
        made, done = [], np.zeros(len(texts), dtype=bool)
        for _ in range(tokens):
            following = logits[:, -1].argmax(-1)
            if self.ends:
                following = np.where(done, self.ends[0], following)
                done |= np.isin(following, self.ends)
            made.append(following)
            if done.all() or len(made) == tokens:
                break
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
            logits, present = self.run(1, following[:, None], mask, mask.sum(1, keepdims=True) - 1, present)
        return np.stack(made, 1).tolist()  # type: ignore[no-any-return]

    def run(
        self, phase: int, ids: Array, mask: Array, positions: Array, past: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Logits, and keys and values under the names by which the next step takes them."""
        session = self.sessions[phase]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        names = [value.name for value in session.get_outputs()]
        results = session.run(names, {value.name: given[value.name] for value in session.get_inputs()})
        held = dict(zip(names, results, strict=True))
        return held.pop("logits"), {name.replace("present", "past_key_values"): x for name, x in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    print(*Generator(given.folder)([given.ids], given.tokens)[0])


if __name__ == "__main__":
    main()
