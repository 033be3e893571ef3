"""Bounds enclose what float32 rounds, and are not much wider than that."""

from __future__ import annotations

import pytest
import torch
from bounded_nets import (
    ACTIVATIONS,
    sound,
)
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification import propagation
from quantguard.certification.graph.graph import model_graph
from quantguard.certification.propagation import around, margins, propagate
from quantguard.certification.rules import activations as curves
from quantguard.certification.rules import intervals, quantizers
from quantguard.certification.rules import linear_bounds as steps
from quantguard.certification.rules.intervals import Interval, narrowed


def _cancelling() -> tuple[nn.Module, Tensor]:
    """Return a model of large sums that nearly cancel, so that its logits are mostly rounding."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 3))
    with torch.no_grad():
        w = 1e3 * torch.randn(64, 128, generator=g)
        model[0].weight.copy_(torch.cat([w, -w + torch.randn(64, 128, generator=g)], 1))
    x = torch.rand(16, 128, generator=g)
    return model.eval(), torch.cat([x, x], 1)


def test_rounding_of_float32_is_within_the_bounds() -> None:
    model, x = _cancelling()
    sound(model, x, qg.Threat(eps=0.0), 2)


def test_without_slack_rounding_is_not_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _cancelling()
    monkeypatch.setattr(propagation, "_WIDER", 0.0)
    sound(model, x, qg.Threat(eps=0.0), 2)
    monkeypatch.setattr(intervals, "gamma", lambda n: 1e-30)
    monkeypatch.setattr(steps, "gamma", lambda n: 1e-30)
    with pytest.raises(AssertionError, match=r"below|above"):
        sound(model, x, qg.Threat(eps=0.0), 2)


def test_bounds_in_float32_are_charged_for_their_own_rounding(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _cancelling()
    sound(model, x, qg.Threat(eps=1e-4), 2)
    monkeypatch.setattr(steps, "roundings", lambda *_: 0)
    with pytest.raises(AssertionError, match="float32: narrower"):
        sound(model, x, qg.Threat(eps=1e-4), 2)


def test_overflow_is_never_certified() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e30)
        model[2].weight.copy_(torch.tensor([[1e30] * 4, [-1e30] * 4]))
    x = torch.full((2, 4), 0.5)
    for layers in (model, _normed_overflow()):
        graph = model_graph(layers.eval(), qg.Threat(eps=0.1), None, x)
        for brief in (False, True):
            with torch.no_grad():
                logits = propagate(graph, around(x, qg.Threat(eps=0.1), brief=brief))
                lower = margins(logits, torch.zeros(2).long(), False)
            assert lower[:, 1].isnan().all()


def _normed_overflow() -> nn.Module:
    """Return a sum that overflows, and a BatchNorm that scales it down again."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
        model[1].weight.fill_(1e-38)
    return model


def test_narrowing_goes_inwards_and_not_too_far() -> None:
    x = torch.tensor([0.1, 1 / 3, -0.1, 1.0, 0.0, 1e-50, -1e-50, float("nan")],
                     dtype=torch.float64)
    up, down = narrowed(x, True).double(), narrowed(x, False).double()
    assert (up[:7] >= x[:7]).all() and (down[:7] <= x[:7]).all() and up[7].isnan()
    assert (up - down)[:7].max() < 1e-7 and up[3] == down[3] == 1


def test_a_threshold_between_two_floats_is_decided_exactly() -> None:
    t = torch.tensor(0.3)
    q = qg.QuantActivation.from_thresholds([float(t)], 1.0).eval()
    just_above = t.double() + 1e-12  # no float32 number lies between the threshold and here
    box = quantizers.quantized(q, Interval(t.double().reshape(1, 1), just_above.reshape(1, 1)))
    assert box.lower == box.upper == 0
    box = quantizers.quantized(q, Interval(just_above.reshape(1, 1), just_above.reshape(1, 1) + 1))
    assert box.lower == box.upper == 1


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "prelu"])
def test_activations_round_by_less_than_a_quarter_of_their_slack(name: str) -> None:
    f = ACTIVATIONS[name]().eval()
    x = torch.cat([torch.linspace(-30, 30, 200_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    x = x[:, None]
    with torch.no_grad():
        exact = f(x.double().clone())
        box = curves.activated(f, Interval(x.double(), x.double()))
        off = (f(x.clone()).double() - exact).abs()
    assert (off <= (box.upper - exact) / (1.01 if "early" in name else 4) + 0).all()
