"""The block of real models: its line, its weights bit for bit, its frequencies, and q, k, v and o computed again from it."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import block_models
import onnx
import pytest
import torch
from block_models import FAMILIES
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.block import Block, CacheUpdate, Rotary
from attnopt.ir.block_reference import as_rows, projected, rows
from attnopt.ir.site import Site
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks

SDPA = ("gpt2", "llama", "qwen3", "falcon")
ONNX = (
    "gpt2", "llama_yarn", "qwen3", "olmo2", "phi3", "falcon", "falcon_groups", "bloom", "gptj", "gpt_neox", "gemma2", "bart", "glm4",
)  # fmt: skip
ONNX_CASES = [*((family, "eager") for family in ONNX), ("bert", "sdpa"), ("llama", "sdpa")]


@dataclass
class Found:
    """The block of a family's chosen attention, in its host."""

    host: Any
    site: Site
    block: Block
    inputs: dict[str, Tensor]


def chosen(family: str, host: Any, inputs: dict[str, Tensor]) -> Found:
    sites = recognise(host.graph).sites
    blocks = find_blocks(host.graph, sites)
    wanted = [(s, b) for s, b in zip(sites, blocks, strict=True) if s.name == FAMILIES[family].attention]
    ((site, block),) = wanted
    return Found(host, site, block, inputs)


def through_fx(family: str, model: nn.Module) -> Found:
    host = FxHost.from_captured(capture(model, block_models.inputs(family)))
    return chosen(family, host, host.example_inputs())


def through_onnx(family: str, model: nn.Module) -> Found:
    named = block_models.inputs(family)
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    dims = {name: dict.fromkeys(range(2 if x.ndim == 2 else 1), torch.export.Dim.DYNAMIC) for name, x in tensors.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = {name: dims.get(name) for name in named}
        program = torch.onnx.export(model, (), kwargs=named, dynamo=True, dynamic_shapes=shapes, verbose=False)
        program.save(buffer)
    return chosen(family, OnnxHost.from_model(onnx.load_from_string(buffer.getvalue())), tensors)


def check(family: str, model: nn.Module, found: Found) -> None:
    """Exporters to ONNX add one to a stored gain themselves."""
    block, text = found.block, FAMILIES[family].text
    assert str(block) == (text if found.host.kind == "torch" else text.replace(" (1 + weight)", ""))
    assert not block.missing
    weights_are_those_of_the_model(family, model, block)
    frequencies_are_those_of_the_model(family, model, block)
    for name in "qkv":
        operand_is_computed_again(found, name)
    output_is_computed_again(found)


def weights_are_those_of_the_model(family: str, model: nn.Module, block: Block) -> None:
    attention = block_models.attention_module(family, model)
    for name, weight in FAMILIES[family].weights(attention).items():
        projection = getattr(block, name)
        assert torch.equal(projection.rows().flatten(0, 1), weight), name
    assert block.o is not None
    assert torch.equal(block.o.rows().flatten(0, 1), block_models.output_weight(family, model).T)


def frequencies_are_those_of_the_model(family: str, model: nn.Module, block: Block) -> None:
    path = FAMILIES[family].inv_freq
    if path:
        assert block.rotary is not None
        assert torch.equal(block.rotary.inv_freq, model.get_buffer(path))
        assert block.rotary.on == ("q", "k")


def operand_is_computed_again(found: Found, name: str) -> None:
    """From what the projection reads to what the attention reads, against both as the model computes them."""
    site, block, operand = found.site, found.block, getattr(found.site, name)
    turn, cache = block.part(name, Rotary), block.part(name, CacheUpdate)
    positions = turn.positions if turn is not None else None
    asked = {"x": getattr(block, name).input, "wanted": operand.value}
    asked |= {"positions": positions.value} if positions is not None else {}
    asked |= {"past": cache.past.value} if cache is not None else {}
    held = dict(zip(asked, found.host.tap(list(asked.values()), found.inputs), strict=True))
    wanted = as_rows(operand, held["wanted"], site.axes)
    given: dict[str, Tensor] = {}
    if positions is not None:
        given["positions"] = as_rows(positions, held["positions"], site.axes)[..., 0, 0]
    if cache is not None:
        given["past"] = as_rows(cache.past, held["past"], site.axes)
    x = held["x"].reshape(wanted.shape[0], -1, held["x"].shape[-1])
    again = rows(block, name, x, **given)
    assert wanted.abs().max() > 0.1  # an error would show
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


def output_is_computed_again(found: Found) -> None:
    assert found.block.o is not None
    bias = found.block.o.bias
    heads, made = found.host.tap([found.site.output.value, found.block.o.node.output], found.inputs)
    again = projected(found.block.o, as_rows(found.site.output, heads, found.site.axes))
    within = bias is None or bias in found.block.o.node.inputs
    wanted = made if within else made + bias.load()
    torch.testing.assert_close(again.reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_traced_models(family):
    model = block_models.build(family)
    check(family, model, through_fx(family, model))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", SDPA)
def test_blocks_around_fused_attention(family):
    model = block_models.build(family, "sdpa")
    check(family, model, through_fx(family, model))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "attention"), ONNX_CASES)
def test_blocks_of_onnx_models(family, attention):
    model = block_models.build(family, attention)
    check(family, model, through_onnx(family, model))
