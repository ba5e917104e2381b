"""Tiny models of many kinds through every ONNX exporter that takes them: TorchScript, dynamo, and transformers' own."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from hf_models import VOCABULARY
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from attnopt.hosts.fx.caches import our_forms
from attnopt.hosts.fx.trees import told

EXPORTERS = ("torchscript", "dynamo", "transformers", "transformers-fused")
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
DECODER: dict[str, Any] = {
    **SMALL, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
PATCHES = {"image_size": 32, "patch_size": 8}
T = transformers
# family: (class, configuration, its fields, attentions)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig, DECODER, 1),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config, DECODER, 1),
    "gemma2": (T.Gemma2ForCausalLM, T.Gemma2Config, {**DECODER, "sliding_window": 6}, 1),
    "bloom": (T.BloomForCausalLM, T.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 4}, 1),
    "bart": (T.BartForConditionalGeneration, T.BartConfig, {**PAIR, "max_position_embeddings": 64}, 3),
    "whisper": (
        T.WhisperForConditionalGeneration,
        T.WhisperConfig,
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        3,
    ),
    "vit": (T.ViTModel, T.ViTConfig, {**SMALL, **PATCHES}, 1),
    "clip": (
        T.CLIPModel,
        T.CLIPConfig,
        {
            "text_config": {
                **SMALL,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 32,
                "bos_token_id": 0,
                "eos_token_id": 98,
            },
            "vision_config": {**SMALL, **PATCHES},
            "projection_dim": 16,
        },
        2,
    ),
}
EAGER_ONLY = ("gemma2", "bloom")  # transformers has no other attention for them that exports


def build(family: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    kind, configuration, fields, _ = FAMILIES[family]
    return kind(configuration(attn_implementation=attention, **fields)).eval()  # type: ignore[no-any-return]


def inputs(family: str, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Named tensors; the last row of tokens is padded by three."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    pixels = {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    words = {"input_ids": ids, "attention_mask": mask}
    if family == "vit":
        return pixels
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 32, generator=generator), "decoder_input_ids": ids[:, :7]}
    if family == "clip":
        return words | pixels
    return words | ({"decoder_input_ids": ids[:, :7]} if family == "bart" else {})


class ByPosition(nn.Module):
    """What the TorchScript exporter takes: tensors in, tensors out; keys and values of a cache one by one behind the mask."""

    def __init__(self, model: nn.Module, names: list[str], options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, options

    def forward(self, *given):
        named = dict(zip(self.names, given, strict=False))
        flat = given[len(self.names) :]
        if not flat and not self.options.get("use_cache"):
            return self.model(**named, **self.options)[0]
        cache = DynamicCache(list(zip(flat[::2], flat[1::2], strict=True)))
        made = self.model(**named, past_key_values=cache, use_cache=True)
        return (made.logits, *(x for layer in made.past_key_values.layers for x in (layer.keys, layer.values)))


@contextlib.contextmanager
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@functools.cache
def export(family: str, attention: str, exporter: str) -> onnx.ModelProto:
    model, named = build(family, attention), inputs(family)
    options = {} if family in ("vit", "clip") else {"use_cache": False}
    with quiet():
        if exporter == "torchscript":
            axes = {
                n: {0: "batch"} | ({1: "target" if "decoder" in n else "length"} if x.ndim == 2 else {}) for n, x in named.items()
            }
            return torchscript(ByPosition(model, list(named), options), named, ["output"], axes)
        if exporter == "dynamo":
            free = torch.export.Dim.DYNAMIC
            dims = {n: dict.fromkeys(range(2 if x.ndim == 2 else 1), free) for n, x in named.items()} | dict.fromkeys(options)
            return torch.onnx.export(
                model, (), kwargs=named | options, dynamo=True, dynamic_shapes=dims, verbose=False
            ).model_proto  # fmt: skip
        return by_transformers(model, named, exporter)


def torchscript(
    model: nn.Module, named: dict[str, Tensor], outputs: list[str], axes: dict[str, dict[int, str]]
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        model.eval(), tuple(named.values()), buffer, dynamo=False, opset_version=17, input_names=list(named), output_names=outputs,
        dynamic_axes=axes,
    )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


def by_transformers(model: nn.Module, named: dict[str, Any], exporter: str) -> onnx.ModelProto:
    fused = {"ort_fusions": "cpu"} if exporter == "transformers-fused" else {}
    made = OnnxExporter().export(model, dict(named), config=OnnxConfig(dynamic=True, **fused))
    return onnx_ir.to_proto(made.program)


# Steps on a cache: keys and values of the past come in, those of past and present go out.


def past_inputs(family: str, past: int = 5, new: int = 3, batch: int = 2) -> dict[str, Tensor]:
    """Keys and values in the order layer by layer, each key before its value."""
    generator = torch.Generator().manual_seed(past)
    layers = FAMILIES[family][2]["num_hidden_layers"]
    mask = torch.ones(batch, past + new, dtype=torch.long)
    mask[-1, :2] = 0
    named = {"input_ids": torch.randint(3, VOCABULARY, (batch, new), generator=generator), "attention_mask": mask}
    kept = [f"past.{i}.{what}" for i in range(layers) for what in ("key", "value")]
    return named | {name: torch.randn(batch, 2, past, 8, generator=generator) for name in kept}


@functools.cache
def export_with_past(family: str, exporter: str) -> onnx.ModelProto:
    """TorchScript takes the tensors one by one, the others a DynamicCache."""
    model, named = build(family, "eager"), past_inputs(family)
    ids, mask, *flat = named.values()
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    with quiet():
        if exporter == "torchscript":
            presents = [n.replace("past", "present") for n in list(named)[2:]]
            axes = {"input_ids": {0: "batch", 1: "new"}, "attention_mask": {0: "batch", 1: "total"}}
            axes |= {n: {0: "batch", 2: "past"} for n in list(named)[2:]} | {n: {0: "batch", 2: "total"} for n in presents}
            return torchscript(ByPosition(model, ["input_ids", "attention_mask"], {}), named, ["logits", *presents], axes)
        tokens = {"input_ids": ids, "attention_mask": mask}
        if exporter == "dynamo":
            cache = DynamicCache(pairs)
            given = {**tokens, "past_key_values": cache, "use_cache": True}
            free = torch.export.ShapesCollection()
            for tensor in (ids, mask, *(x for layer in cache.layers for x in (layer.keys, layer.values))):
                free[tensor] = dict.fromkeys((0, 1) if tensor.ndim == 2 else (0, 2), torch.export.Dim.DYNAMIC)
            with told(our_forms()):
                dims = free.dynamic_shapes(model, (), given)
                return torch.onnx.export(model, (), kwargs=given, dynamo=True, dynamic_shapes=dims, verbose=False).model_proto
        return by_transformers(model, {**tokens, "past_key_values": DynamicCache(pairs)}, exporter)


@functools.cache
def merged(family: str, exporter: str) -> onnx.ModelProto:
    """The first step and later ones in one file, as optimum merges them: `use_cache_branch` chooses, weights stand outside.

    The first step takes a past as well, of any length, and does not read it.
    """
    later, model, named = export_with_past(family, exporter), build(family, "eager"), past_inputs(family)
    tokens = {"input_ids": named["input_ids"], "attention_mask": torch.ones_like(named["input_ids"])}
    outputs = [o.name for o in later.graph.output]
    with quiet():
        whole = ByPosition(model, list(tokens), {"use_cache": True})
        if exporter == "torchscript":
            axes = {name: {0: "batch", 1: "new"} for name in tokens} | {name: {0: "batch", 2: "new"} for name in outputs[1:]}
            first = torchscript(whole, tokens, outputs, axes)
        else:
            dims = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in tokens)
            given = (tuple(tokens.values()),)
            first = torch.onnx.export(
                whole,
                given[0],
                dynamo=True,
                dynamic_shapes=(dims,),
                verbose=False,
                output_names=outputs,
                input_names=list(tokens),
            ).model_proto
    inputs = [i.name for i in later.graph.input]
    branches, weights = [], []
    for prefix, proto in (("then_", later), ("else_", first)):
        given = dict(zip([i.name for i in proto.graph.input], inputs, strict=False))
        graph = onnx.compose.add_prefix_graph(proto.graph, prefix)
        weights += graph.initializer
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name.removeprefix(prefix) in given:
                    node.input[i] = given[name.removeprefix(prefix)]
        branches.append(
            onnx.helper.make_graph(list(graph.node), prefix, [], list(graph.output), value_info=list(graph.value_info))
        )
    chooses = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    node = onnx.helper.make_node("If", ["use_cache_branch"], outputs, "merged", then_branch=branches[0], else_branch=branches[1])
    made = onnx.helper.make_graph([node], "merged", [*later.graph.input, chooses], list(later.graph.output), initializer=weights)
    model_proto = onnx.helper.make_model(made, opset_imports=list(later.opset_import), ir_version=later.ir_version)
    onnx.checker.check_model(model_proto)
    return model_proto
