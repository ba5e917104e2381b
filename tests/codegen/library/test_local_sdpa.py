"""Local attention on torch: equal to the reference, in a traced model and in a saved one, at every length."""

from __future__ import annotations

import pytest
import torch
from lowering_cases import BEYOND_SCALE_AND_BIAS, check
from lowering_cases import CASES as TABLE
from torch import Tensor, nn
from windows import SETTINGS, Setting

import attnopt
from attnopt.codegen.library.local_sdpa import LocalSdpa
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse
from attnopt.patterns import recognise
from attnopt.plan.choose import Chosen, apply_choices
from attnopt.runtime.local import run_local

MORE = {
    "computed_places": Setting(
        "softmax add(load(table, h, min(max(q - k, 0), 4))) causal & window(20)", operands={"table": "hk"}
    ),
    "last_rows": Setting("softmax scale(0.25) causal & window(20) & last_query(40) empty(zero)"),
}
# A kernel that never shows its scores has no place for soft caps and factors per head.
WINDOWS = ("window", "window_or_global", "window_of_one", "window_of_all", "window_both_sides", "softcap_window")
CASES = {n: s for n, s in (SETTINGS | MORE).items() if not any(b in s.spec for b in ("softcap", "load(s,"))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "length"), [(1, 6), (2, 5), (2, 64), (1, 131), (2, 200)])
def test_equal_to_the_reference_at_every_length(name, batch, length):
    setting = CASES[name]
    for padding in ("left", "right") if "padding" in setting.operands else ("",):
        data = setting.data(batch, length, padding)
        tensors = [data[n] for n in parse(setting.spec).operands]
        made, wanted = run_local(data["q"], data["k"], data["v"], tensors, setting.spec), setting.wanted(data)
        if "free" in setting.spec:
            seen = attend(setting.spec, **data).lse[..., None].isfinite()
            made, wanted = made.masked_fill(~seen, 0), wanted.masked_fill(~seen, 0)
        tolerance = 5e-3 if setting.dtype == "float16" else 2e-5
        torch.testing.assert_close(made, wanted, atol=tolerance, rtol=tolerance)


class Window(nn.Module):
    """Attention with a window of 20, causal, under a padding mask [batch, length]; empty rows average."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in x.chunk(3, -1))
        at = torch.arange(x.shape[1])
        visible = (at[None] <= at[:, None]) & (at[:, None] - at[None] < 20) & seen[:, None, None, :].bool()
        scores = (q @ k.mT * 0.25).masked_fill(~visible, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    seen = torch.ones(batch, length, dtype=torch.long)
    seen[-1, : length // 2] = 0
    return {"x": torch.randn(batch, length, 192), "seen": seen}


@pytest.fixture(scope="module")
def host() -> FxHost:
    return FxHost.from_captured(capture(Window().eval(), inputs(2, 90)))


def test_in_a_traced_model(host):
    (site,) = recognise(host.graph).sites
    assert str(site.spec) == "softmax heads(4) width(16) scale(0.25) causal & window(20) & padding"
    assert LocalSdpa().supports(site, "torch") is None
    result = apply_choices(host, [Chosen(site, LocalSdpa(), "test")])
    run = result.runner()
    for batch, length in ((2, 90), (3, 7), (1, 300)):
        data = inputs(batch, length)
        torch.testing.assert_close(run(data)[0], Window()(**data), atol=2e-5, rtol=2e-5)


def test_saved_with_an_open_length(host, tmp_path):
    (site,) = recognise(host.graph).sites
    apply_choices(host, [Chosen(site, LocalSdpa(), "test")]).save_pt2(tmp_path / "window.pt2", {})
    call = attnopt.load(tmp_path / "window.pt2")
    for batch, length in ((2, 90), (3, 7), (2, 300)):
        data = inputs(batch, length)
        torch.testing.assert_close(call(**data), Window()(**data), atol=2e-5, rtol=2e-5)


REFUSED = {
    "softmax causal": "proves no window",
    "softmax softcap(2.0) causal & window(20)": "do not fit scale, then bias",
    "softmax causal & window(20) & load(other, b, k)": "other is not known",
    "softmax causal & window(20) & k < size(memory)": "size(memory) is not known",
    "softmax offset(3) causal & window(20)": "do not start at position 0",
    "sigmoid causal & window(20)": "normaliser",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refused_with_the_reason(host, spec):
    (site,) = recognise(host.graph).sites
    refused = LocalSdpa().supports(site.with_step("test", parse(spec)), "torch")
    assert refused is not None and REFUSED[spec] in refused.reason


def test_refused_on_other_runtimes(host):
    (site,) = recognise(host.graph).sites
    assert "runtime tvm" in LocalSdpa().supports(site, "tvm").reason


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_all_lowerings(name):
    unproved = f"mask '{parse(TABLE[name].spec).mask}' proves no window on both sides of a query"
    check(LocalSdpa(), TABLE[name], BEYOND_SCALE_AND_BIAS.get(name, "") if name in WINDOWS else unproved)
