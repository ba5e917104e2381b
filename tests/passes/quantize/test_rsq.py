"""rsq: GPTQ bit for bit where tokens count alike and nothing is rotated; less weighted error where they do not; both hosts, replayed."""

from __future__ import annotations

import functools
from dataclasses import replace

import hf_models
import onnx_exports
import pytest
import torch

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.ir.site import Refusal
from attnopt.opening import open_model
from attnopt.passes import Gptq, Rsq
from attnopt.passes.edits.layers.attention_layers import layers_of
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.passes.edits.layers.moments import LayerAfterLayer, moments_at_once
from attnopt.passes.rotation import rotated
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.options.groups import Grouping
from attnopt.rounding.gptq import reconstruction_error
from attnopt.rounding.grids import Gridding
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

SMALL = {"smallest": 16, "wishes": (Wish(4, 16),)}


@functools.cache
def seen(family, kind):
    """A host's groups and evidence of four sequences."""
    example = tensors(hf_models.inputs(family))
    options = {"use_cache": False} if kind == "torch" and family != "bert" else {}
    model = hf_models.build(family) if kind == "torch" else onnx_exports.export(family, "eager", "dynamo")
    host = open_model(model, {**example, **options}, dynamic_shapes=None, need_inputs=True).host
    batches = [host.named_inputs({**tensors(hf_models.inputs(family, length=n)), **options}) for n in (12, 10)]
    grouping = Grouping(host)
    return grouping, Evidence(host, Calibration.of(host.graph, batches), sites=grouping.sites), batches


def tensors(inputs):
    return {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}


def proposed(family="llama", kind="torch", **options):
    """The candidate of the original model's moments, with its arrays."""
    grouping, evidence, _ = seen(family, kind)
    return with_arrays(Rsq(**SMALL, in_turn=False, **options), grouping.of("model")[0], evidence)


def with_arrays(rewrite, group, evidence):
    candidate = rewrite.propose(group, evidence)[-1]
    return replace(candidate, arrays=rewrite.arrays(candidate, group, evidence))


def test_alike_tokens_without_rotation_are_gptq():
    """Bit for bit, the head apart."""
    grouping, evidence, _ = seen("llama", "torch")
    mine = proposed(rotate=False, least=1.0).arrays
    theirs = {n: x for g in grouping.of("linear") for n, x in with_arrays(Gptq(**SMALL), g, evidence).arrays.items()}
    assert mine.keys() == theirs.keys() and len(mine) == 15
    different = [name for name in mine if not torch.equal(mine[name]["codes"], theirs[name]["codes"])]
    assert len(different) == 1  # the head


def test_what_receives_attention_loses_less():
    grouping, evidence, _ = seen("llama", "torch")
    layers = [(grouping.sites[0], [n for n in grouping.linears if "layers.0" in n.source.module])]
    (moments,) = evidence.concentrated_moments(layers, 0.005)
    told, plain = (proposed(rotate=False, least=least) for least in (0.005, 1.0))
    errors = [0.0, 0.0]
    for node in layers[0][1]:
        for i, candidate in enumerate((told, plain)):
            format = WeightFormat.read(candidate.storage[node.name])
            made = RoundedWeight.from_arrays(format, candidate.arrays[node.name], matrix(node).shape[1])
            errors[i] += reconstruction_error(matrix(node), made, moments[node.name])
    assert errors[0] < errors[1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("family", "mix", "in_turn"), [("llama", False, False), ("bert", True, False), ("llama", True, True)])
def test_the_result_is_near_and_the_original_stays(family, kind, mix, in_turn):
    grouping, evidence, (inputs, _) = seen(family, kind)
    host, rewrite = grouping.host, Rsq(smallest=16, wishes=(Wish(8, 16),), mix=mix, in_turn=in_turn)
    candidate = with_arrays(rewrite, grouping.of("model")[0], evidence)
    assert (candidate.needs, candidate.changes) == ("tuning" if in_turn else "calibration", ("weights",))
    how = "values and residual stream rotated" if family == "llama" else "values rotated"
    assert how in candidate.description
    wanted = host.runner()(inputs)[0]
    copy = host.copy()
    rewrite.apply(candidate, replace(Grouping(copy).of("model")[0], host=copy))
    copy.finish()
    got = copy.runner()(inputs)[0]
    assert 1e-5 < float((got - wanted).norm() / wanted.norm()) < 0.05
    torch.testing.assert_close(host.runner()(inputs)[0], wanted, atol=0, rtol=0)


def test_layers_of_massive_values_are_kept_in_eight_bits():
    """With a factor that some channel reaches; with none no layer is."""
    plain, guarded = (proposed(rotate=False, least=1.0, protect=factor) for factor in (0.0, 1.01))
    kept = [name for name, format in guarded.storage.items() if format.startswith("int8")]
    assert [name for name, format in plain.storage.items() if format.startswith("int8")] == kept[-1:]  # the head
    queries = {b.q.node.name for b in seen("llama", "torch")[0].blocks} | {
        b.k.node.name for b in seen("llama", "torch")[0].blocks
    }
    assert 1 < len(kept) <= 5 and set(kept[:-1]) <= queries


def test_without_data_or_attention_it_refuses():
    grouping, evidence, _ = seen("llama", "torch")
    (group,) = grouping.of("model")
    assert Rsq().propose(group, None).reason == "RSQ needs calibration data"
    bare = replace(group, sites=(), blocks=())
    assert Rsq(**SMALL).propose(bare, evidence).reason == "no attention with known projections"
    assert isinstance(Rsq().propose(group, evidence), Refusal)  # 64 is the smallest layer by default


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_layer_after_layer_sees_the_rotated_model_and_what_was_rounded_before(kind):
    """The moments of the first layer are those of the original, rotated; of the next they hold its error, and that of no error is none."""
    grouping, evidence, _ = seen("llama", kind)
    (group,) = grouping.of("model")
    layers = layers_of(group)
    turned = rotated(group)
    at_once = list(moments_at_once(layers, turned, evidence, 0.005))
    for bits, least, most in ((8, 1e-7, 1e-2), (2, 1e-2, 1.0)):
        made = {}
        swept = LayerAfterLayer(group, turned, {}, evidence, 0.005).moments(layers, made)
        found = [next(swept)]
        for node in layers[0][1]:
            made[node] = Gridding().rounded(turned.matrix(node), WeightFormat(bits, 16))
        found.append(next(swept))
        for name, moment in found[0].items():
            torch.testing.assert_close(moment, at_once[0][name], atol=1e-4 * float(moment.abs().max()), rtol=1e-3)
        away = [float((moment - at_once[1][name]).norm() / at_once[1][name].norm()) for name, moment in found[1].items()]
        assert all(least < x < most for x in away), away
