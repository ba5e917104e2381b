"""Every cache method on graphs of decoding steps of real models: followed for some steps, torch and onnxruntime agree and stay near."""

from __future__ import annotations

import functools

import hf_models
import onnxruntime
import pytest
import torch
from decoding_models import named, past_of, step_of

from attnopt.passes import AkvqVl, Int2Cache, Int4Cache, Int8Cache, ZipCache
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping

METHODS = [
    (Int8Cache(), "int8", 0.01),
    (Int4Cache(group=4), "int4", 0.1),
    (Int2Cache(group=4), "2-bit", 0.4),
    (AkvqVl(recent=4, pivots=1), "2-bit pivots, folded", 0.4),
    (ZipCache(block=4), "50% salient", 0.4),
    (ZipCache(block=4), "4-bit blocks", 0.1),
]
IDS = torch.randint(0, hf_models.VOCABULARY, (2, 22), generator=torch.Generator().manual_seed(0))
START = 10


@functools.cache
def steps(family):
    model = hf_models.build(family, "sdpa")
    return model, {kind: step_of(model, IDS[:, : START + 1], kind) for kind in ("torch", "onnx")}


def kept(rewrite, host, kind):
    group = Grouping(host, recognise(host.graph).sites).whole()[0]
    candidate = next(c for c in rewrite.propose(group, None) if c.kind == kind)
    made = host.copy()
    rewrite.apply(candidate, Grouping(made, recognise(made.graph).sites).whole()[0])
    made.finish()
    return made


CASES = [("llama", *one) for one in METHODS] + [("gpt2", *METHODS[i]) for i in (3, 4)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("family", "rewrite", "kind", "near"), CASES, ids=[f"{f} {r.name} {kind}" for f, r, kind, _ in CASES])
def test_steps_of_a_model(family, rewrite, kind, near, tmp_path):
    model, hosts = steps(family)
    with torch.no_grad():
        exact = model(IDS, use_cache=False).logits
    found = {}
    for name, host in hosts.items():
        made = kept(rewrite, host, kind)
        assert len(recognise(made.graph).sites) == len(recognise(host.graph).sites)
        run, state = made.runner(), made.adapt(named(host, IDS[:, START : START + 1], past_of(model, IDS[:, :START])))
        names, outputs = list(state), []
        for at in range(START, IDS.shape[1]):
            logits, *past = run(state)
            outputs.append(logits[:, 0])
            state = dict(zip(names, (IDS[:, at + 1 : at + 2], *past), strict=True))
        found[name] = torch.stack(outputs, 1)
        if name == "onnx":
            made.save(tmp_path / "step.onnx", {})
            session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
            assert [i.name for i in session.get_inputs()] == names
            assert {n.domain for n in made.model.graph} <= {"", "ai.onnx"}
    spread = exact[:, START:].std()
    torch.testing.assert_close(found["onnx"], found["torch"], atol=float(0.02 * spread), rtol=0.0)
    distance = (found["torch"] - exact[:, START:]).square().mean().sqrt() / spread
    assert 1e-5 < distance < near
