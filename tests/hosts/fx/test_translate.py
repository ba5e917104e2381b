"""Every canonical node means what its ATen operators compute, on whole models and on single spellings."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from canonical import check, values_in_host
from hf_models import CASES, build, inputs
from torch import nn

from attnopt.hosts.fx import FxHost, capture


def checked(model: nn.Module, example, **options) -> tuple[FxHost, int]:
    host = FxHost.from_captured(capture(model, example, **options))
    values = [*host.graph.inputs, *values_in_host(host.graph)]
    named = host.example_inputs()
    return host, check(host.graph, dict(zip(values, host.tap(values, named), strict=True)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_models_mean_the_same_node_by_node(family, attention):
    host, compared = checked(build(family, attention, layers=1), inputs(family))
    opaque = {n.attrs["operator"] for n in host.graph.of("opaque")}
    assert compared > 40
    assert opaque <= {"aten.index.Tensor", "aten.gather.default", "aten.all.default"}, opaque


def rows_assigned(x, y):
    made = x.clone()
    made[:, :, torch.tensor([3, 1])] = x[:, :, :2] * 2
    return made


def assigned(x, y):
    made = torch.zeros_like(x)
    made[..., :2] = y[:, :, :4, :2]
    made[..., 2:] = x[..., :4]
    return made


def last_assigned(x, y):
    made = torch.zeros_like(y)
    made[:, -1, 1:] = x[:, 0, :1].expand(2, 5, 6)[..., :4]
    made[:, 0] = y[:, 2]
    return made


def middle_assigned(x, y):
    made = x * 2
    made[:, :, 1:-1, -3:-1] = y[:, :, 2:4, :2]
    made[:, 1:] = y[:, :2, :4, :1]
    return made


class Spellings(nn.Module):
    """One module per line: (name, function of x [2, 3, 4, 6] and y [2, 3, 6, 4])."""

    CASES: ClassVar = {
        "strided_chunks": lambda x, y: x.contiguous().as_strided((x.shape[0], 3, 2, 3, 6), (72, 24, 6, 6, 1)),
        "strided_within": lambda x, y: y.contiguous().as_strided((y.shape[0], 3, 3, 4, 4), (72, 24, 4, 4, 1)),
        "unfold": lambda x, y: y.unfold(2, 4, 2),
        "pad": lambda x, y: nn.functional.pad(x, (0, 3, 1, 2), value=-1.0),
        "flip": lambda x, y: x.flip(dims=(1, -1)),
        "select_assigned": last_assigned,
        "inner_slice_assigned": middle_assigned,
        "einsum_scores": lambda x, y: torch.einsum("bhqd,bhdk->bhqk", x, y),
        "einsum_heads_last": lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x, x),
        "einsum_merged": lambda x, y: torch.einsum("bhqd,cbd->hqbc", x, y[:, :2, :, 0]),
        "baddbmm": lambda x, y: torch.baddbmm(y[:, 0, :4], x[:, 0], y[:, 0], beta=0.5, alpha=2.0),
        "baddbmm_unread": lambda x, y: torch.baddbmm(y[:, 0, :4], x[:, 0], y[:, 0], beta=0, alpha=0.25),
        "addmm": lambda x, y: torch.addmm(y[0, 0, 0], x[0, 0], y[0, 0]),
        "repeat_interleave": lambda x, y: x.repeat_interleave(2, dim=1),
        "repeat": lambda x, y: x.repeat(1, 2, 1, 1),
        "repeat_as_expand": lambda x, y: x[:, :1].repeat(1, 5, 1, 1),
        "cat_with_nothing": lambda x, y: torch.cat([torch.tensor([]), x], 2) * torch.cat([x, torch.tensor([]), x], 1)[:, :3],
        "round": lambda x, y: (x * 4).round() / 2 + y.sum() * 0,
        "chunk": lambda x, y: torch.cat([t * i for i, t in enumerate(x.chunk(3, dim=-1))], -1),
        "split": lambda x, y: sum(x.split([1, 1, 1], dim=1)),
        "unbind": lambda x, y: torch.stack(x.unbind(1), dim=2),
        "select": lambda x, y: x[:, -1] + x[:, 0],
        "movedim": lambda x, y: x.movedim(1, -1),
        "masked_fill": lambda x, y: x.masked_fill(x > 0.5, -1e4),
        "where_scalar": lambda x, y: torch.where(x > 0, x, -torch.inf).softmax(-1),
        "clamp": lambda x, y: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
        "nan_to_num": lambda x, y: torch.nan_to_num(x.log()) + torch.nan_to_num(x / 0.0, nan=2.0),
        "fill": lambda x, y: x + torch.zeros(4, 6).fill_(-3.0),
        "subtract_alpha": lambda x, y: torch.sub(x, y.mT, alpha=3),
        "rsub": lambda x, y: 1.0 - x,
        "max_with_indices": lambda x, y: x - x.max(-1, keepdim=True).values,
        "triangle": lambda x, y: torch.triu(torch.full((4, 4), -torch.inf), diagonal=1) + x[..., :4],
        "take": lambda x, y: x[:, :, torch.tensor([0, 2])],
        "floor_division": lambda x, y: (x * 10) // 3 + torch.remainder(x, 0.3),
        "norms": lambda x, y: nn.functional.layer_norm(x, (6,)) + nn.functional.rms_norm(x, (6,), eps=1e-5),
        "norm_of_small_numbers": lambda x, y: nn.functional.rms_norm(x * 1e-3, (6,)),
        "norm_of_small_halves": lambda x, y: nn.functional.rms_norm((x * 1e-3).half(), (6,)).float(),
        "sdpa": lambda x, y: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        "sdpa_grouped": lambda x, y: nn.functional.scaled_dot_product_attention(
            x, x[:, :1], x[:, :1], scale=0.3, enable_gqa=True
        ),
        "rows_of_a_table": lambda x, y: x[:1, 0].gather(1, torch.tensor([[[3], [0]]]).expand(1, 2, 6)),
        "index_copy": lambda x, y: x.index_copy(2, torch.tensor([3, 1]), y[:, :, :2].repeat(1, 1, 1, 2)[..., :6]),
        "rows_assigned": rows_assigned,
        "slice_scatter": lambda x, y: x.slice_scatter(x[..., :2] * 3, dim=3, start=1, end=3),
        "slice_assigned": assigned,
        "length": lambda x, y: nn.functional.normalize(x, dim=-1) + torch.linalg.vector_norm(x, dim=1, keepdim=True),
        "logic": lambda x, y: ((x > 0) & ~(x > 1) | (x < -1)).float().cumsum(-1),
        "differences": lambda x, y: x.diff(dim=2, prepend=x[:, :, :1] - 1, append=y[..., :2, :1].expand(2, 3, 2, 6)),
        "differences_alone": lambda x, y: x.diff(),
        "pad_two": lambda x, y: nn.functional.pad(x, (1, 0, 0, 2), value=-1.5) + nn.functional.pad(x, (0, 1, 2, 0)),
        "pad_nothing": lambda x, y: nn.functional.pad(x, (0, 0)) * 2,
        "in_place": lambda x, y: x.clone().add_(1.0).mul_(2.0),
    }

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x, y):
        return self.CASES[self.name](x, y)


@pytest.mark.parametrize("name", Spellings.CASES)
def test_spelling(name):
    torch.manual_seed(0)
    host, compared = checked(Spellings(name), (torch.randn(2, 3, 4, 6), torch.randn(2, 3, 6, 4)))
    assert compared >= 1
    assert not list(host.graph.of("opaque")) or name == "max_with_indices"


@pytest.mark.parametrize("how", [{"pad": (-1, 0)}, {"pad": (1, 1), "mode": "reflect"}])
def test_padding_that_crops_or_mirrors_stays_opaque(how):
    class Padded(nn.Module):
        def forward(self, x):
            return nn.functional.pad(x, **how)

    host, _ = checked(Padded(), (torch.randn(2, 3, 4),))
    assert [n.op for n in host.graph.nodes] == ["opaque"]


def test_inactive_dropout_and_casts_vanish():
    class Quiet(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, self.training).float().contiguous() * 2

    host, _ = checked(Quiet().train(), (torch.randn(2, 3),))
    assert [n.op for n in host.graph.nodes] == ["mul"]


def test_regions_without_gradients_are_written_out():
    class Region(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
            with torch.autocast("cpu", enabled=False):
                return y @ x.mT

    program = torch.export.export(Region(), (torch.randn(2, 3),), strict=False)
    host = FxHost.from_captured(capture(program))
    assert {"mul", "matmul"} <= {n.op for n in host.graph.nodes}
    assert not list(host.graph.of("opaque"))


class Turned(nn.Module):
    """Neighbouring channels as complex numbers, turned by angles or by a stored table."""

    def __init__(self, stored):
        super().__init__()
        self.stored = stored
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01]))
        self.register_buffer("angles", angles)
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        turn = self.table if self.stored else torch.polar(torch.full_like(self.angles, 2.0), self.angles) * 0.5
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], 3, 2))
        return torch.view_as_real(z * turn[None, :, :]).flatten(-2)


@pytest.mark.parametrize("stored", [False, True])
def test_complex_numbers_are_pairs_of_real_ones(stored):
    host, compared = checked(Turned(stored).eval(), (torch.randn(2, 5, 6),))
    assert not list(host.graph.of("opaque"))
    assert {n.op for n in host.graph.nodes} >= {"slice", "mul", "sub", "add", "concat"}
    assert compared >= 3  # the last of them is what the model returns


def test_complex_numbers_without_a_rule_keep_what_they_read():
    class Spectrum(nn.Module):
        def forward(self, x):
            z = torch.view_as_complex(x.reshape(2, 5, 3, 2))
            return torch.abs(torch.exp(z)) + torch.fft.fft(x[..., :3]).real

    host, _ = checked(Spectrum().eval(), (torch.randn(2, 5, 6),))
    made = next(n for n in host.graph.of("opaque") if "exp" in n.attrs["operator"])
    assert len(made.inputs) == 2
    assert all(i.producer.op == "reshape" for i in made.inputs)


def test_sources_name_module_and_line():
    host, _ = checked(build("bert", layers=1), inputs("bert"))
    node = next(host.graph.of("softmax"))
    assert node.source.module == "encoder.layer.0.attention.self"
    assert node.source.line.startswith("modeling_bert.py:")
