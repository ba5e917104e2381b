"""A live model as a folder, and back.

    config.json  generation_config.json  model.safetensors  attnopt.json

The configuration is the original's. Weights are those of the live model: layers in codes stay in codes, and a parameter that several
modules share is written once. attnopt.json says which modules differ from the class, what each attention layer computes, and holds report
and plan.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt.errors import OutputNotWritable, UnreadableModel
from attnopt.hosts.module.changes import Change, read
from attnopt.hosts.module.interface import BEFORE, WINDOWS

RECORD, WEIGHTS, VERSION = "attnopt.json", "model.safetensors", 5  # 5: folds


def save(model: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Raises OutputNotWritable."""
    from safetensors.torch import save_file

    tensors, aliases = unique(model.state_dict())
    whole = {"version": VERSION, "class": type(model).__name__, "aliases": aliases, **record}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = plain_config(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        (folder / RECORD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    except OSError as failure:
        raise OutputNotWritable(f"cannot write '{folder}': {failure}", next_move="Give a folder that can be written.") from None


def unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each once, and which other names stand for one of them."""
    kept: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in kept:
            aliases[name] = kept[key]
        else:
            kept[key], tensors[name] = name, tensor.contiguous()
    return tensors, aliases


def plain_config(config: Any) -> Any:
    """A copy of the configuration as it was before."""
    made = copy.deepcopy(config)
    before = getattr(made, BEFORE, None)
    for name in (BEFORE, WINDOWS):
        if hasattr(made, name):
            delattr(made, name)
    if before is not None:
        made._attn_implementation_internal = before
    return made


def read_record(folder: Path) -> dict[str, Any]:
    """Raises UnreadableModel for a folder that `save_pretrained` of a live model did not write."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if int(record["version"]) > VERSION:
            raise UnreadableModel(f"'{folder}' was written by a newer attnopt", next_move="Upgrade attnopt.")
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise UnreadableModel(
            f"'{folder}' holds no model that attnopt saved: {failure}",
            next_move="Give a folder that fast.save_pretrained(folder) wrote; another loads by transformers' from_pretrained.",
        ) from None
    return record  # type: ignore[no-any-return]


def restored(folder: Path, record: Mapping[str, Any]) -> tuple[Any, list[Change]]:
    """The saved model without its kernels, and what was changed in it. Raises UnreadableModel."""
    import transformers
    from safetensors.torch import load_file

    kind = getattr(transformers, str(record["class"]), None)
    if kind is None:
        raise UnreadableModel(
            f"transformers has no class '{record['class']}'", next_move="Install the version that it came from."
        )
    try:
        state = load_file(str(folder / WEIGHTS))
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as failure:  # safetensors and transformers raise classes of their own
        raise UnreadableModel(f"'{folder}' cannot be read: {failure}", next_move="Save the model again.") from failure
    state |= {name: state[other] for name, other in record["aliases"].items()}
    config._attn_implementation_internal = record["attention"]
    try:
        model = kind(config)
    except ImportError:  # a kernel package that this machine lacks: torch's own attention computes the same
        config._attn_implementation_internal = "sdpa"
        model = kind(config)
    model = model.eval().requires_grad_(False)
    changes = [read(each, state) for each in record["changes"]]
    for change in changes:
        change.apply(model)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise UnreadableModel(
            f"'{folder}' does not fit {record['class']}: {', '.join([*missing, *unexpected][:3])}",
            next_move="Save the model again.",
        )
    if transformers.GenerationConfig is not None and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False), changes
