"""Every model type of transformers: how many of its attentions are found, as what, and whether the rewrite is exact."""

from __future__ import annotations

import argparse
import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import transformers
from zoo.run import append, read, records
from zoo.subject import TYPES

NAMED = ["bert", "gpt2", "llama", "mistral", "qwen3", "qwen3_moe", "qwen3_next", "gemma2", "gemma3", "phi3", "falcon", "bloom", "mpt", "opt", "gptj", "gpt_neox", "t5", "bart", "whisper", "vit", "swin", "clip", "siglip", "dinov2", "deberta-v2", "deepseek_v2", "deepseek_v3", "mixtral", "dbrx", "gpt_oss", "olmo2", "cohere2", "granite", "glm4", "starcoder2", "perceiver", "detr", "sam", "longformer", "big_bird"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=[*NAMED, *(t for t in TYPES if t not in NAMED)])
    parser.add_argument("--attention", nargs="+", default=["eager"], choices=["eager", "sdpa"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("/tmp/zoo.jsonl"))
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    done = {(r.model_type, r.attention) for r in read(asked.log) if not r.error} if asked.resume else set()
    cases = [(t, a) for t in dict.fromkeys(asked.types) for a in asked.attention if (t, a) not in done]
    for r in records(cases, asked.jobs):
        append(asked.log, r)
        print(
            f"{r.model_type} {r.attention}: {r.covered}/{r.truth} false {r.false} lifted {r.lifted}/{r.lifted + r.tensors} fused {r.fused} diff {r.difference} {r.rewrite_error[:100]} {r.error[:150]} {r.export_seconds:.1f}s {r.dynamic}",
            flush=True,
        )


if __name__ == "__main__":
    main()
