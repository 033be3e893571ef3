"""Bounds hold at every node of random networks, and the checks notice when they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from bounded_nets import (
    ACTIVATIONS,
    EXAMPLES,
    QUANTIZERS,
    Net,
    activation,
    images,
    lines_hold,
    nets,
    random_net,
    sound,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification.graph.graph import model_graph
from quantguard.certification.propagation import around, propagate
from quantguard.certification.rules import activations as curves
from quantguard.certification.rules import linear_bounds as steps
from quantguard.certification.rules import quantizers
from quantguard.certification.rules.intervals import Interval


@EXAMPLES
@given(names=nets, seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 1e-3, 0.02, 0.2]),
       norm=st.sampled_from(["linf", "l2"]))
def test_values_in_random_networks_stay_within_bounds(
        names: list[tuple[str, str]], seed: int, eps: float, norm: str) -> None:
    threat = qg.Threat(norm, eps, mean=(0.4, 0.6), std=(0.5, 0.3))
    assert sound(random_net(names, seed), images(4, seed), threat, 988, seed) == 4000


@pytest.mark.slow
@settings(parent=EXAMPLES, max_examples=250)
@given(names=nets, seed=st.integers(0, 10**6), eps=st.sampled_from([1e-4, 0.01, 0.05, 0.3]),
       norm=st.sampled_from(["linf", "l2"]))
def test_values_at_a_million_points_stay_within_bounds(
        names: list[tuple[str, str]], seed: int, eps: float, norm: str) -> None:
    assert sound(random_net(names, seed), images(4, seed), qg.Threat(norm, eps), 1000,
                 seed) == 4048


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *QUANTIZERS} - {"relu in place"}))
def test_bounds_of_every_activation_hold_and_are_tight(name: str) -> None:
    f = activation(name, torch.Generator().manual_seed(1)).eval()
    model = nn.Sequential(nn.Unflatten(1, (4, 2)), f, nn.Flatten())
    g = torch.Generator().manual_seed(2)
    x = 6 * torch.rand(400, 8, generator=g) - 3
    threat = qg.Threat(eps=0.7, bounds=(-3, 3))
    assert sound(model, x, threat, 188) == 80_000
    with torch.no_grad():
        graph = model_graph(model, threat, None, x)
        box = propagate(graph, around(x, threat))
        grid = torch.linspace(0, 1, 2001)
        low, high = (x - 0.7).clamp(min=-3), (x + 0.7).clamp(max=3)
        least = torch.full_like(x, torch.inf)
        most = -least
        for share in grid:
            y = model(low + share * (high - low))
            least, most = torch.minimum(least, y), torch.maximum(most, y)
    loose = 0.25 if "early" in name else 3e-3
    assert (least - box.lower).max() < loose
    assert (box.upper - most).max() < loose


def _deep() -> tuple[Net, Tensor, qg.Threat]:
    names = [("residual", "2 bits"), ("bn", "gelu"), ("average", "relu"), ("plain", "leaky")]
    return random_net(names, 5), images(4, 5), qg.Threat(eps=0.05)


def test_the_checks_pass_on_the_real_code() -> None:
    model, x, threat = _deep()
    sound(model, x, threat)
    sound(model, x, qg.Threat(eps=1e-5))
    sound(model, x, qg.Threat("l2", 0.1))
    _lines()


def _lines() -> None:
    g = torch.Generator().manual_seed(0)
    left = 3 * torch.rand(300, 4, generator=g, dtype=torch.float64) - 2
    right = left + 2 * torch.rand(300, 4, generator=g, dtype=torch.float64).square()
    for name in ("relu", "relu6", "leaky", "leaky, falling", "prelu", "hardtanh", "hardsigmoid",
                 "softshrink", "1 bit", "2 bits", "3 bits", "4 bits", "2 dynamic", "2 per channel"):
        f = activation(name, g).eval()
        x = Interval(left, right)
        with torch.no_grad():
            if isinstance(f, qg.QuantActivation):
                box = quantizers.quantized(f, x)
            else:
                box = curves.prelu(x, f.weight) if isinstance(f, nn.PReLU) \
                    else curves.activated(f, x)
            lines_hold((left, right), box, f)


def _swapped(self: Any) -> Interval:
    box = _BOX(self)
    return Interval(box.upper, box.lower, box.step, box.ball)


_BOX = steps.Affine.interval


def _no_bias(self: Any) -> Interval:
    self.bias = None
    return _BOX(self)


def _forgetful(self: Any, a: Tensor) -> Any:
    parts, constant = _BACK(self, a)
    return parts, constant if self.bias is None else constant - steps.dot(
        a, self.bias.expand(a.shape[2:])[None])


_BACK = steps.Affine.back

_LINE = steps.lower_line


def _chord(ends: Any, values: Any, corners: Any) -> Any:
    slope = (values[1] - values[0]) / (ends[1] - ends[0]).clamp(min=1e-9)
    return slope, values[0] - slope * ends[0]


def _without_turns(f: Any, curve: Any, x: Interval) -> Interval:
    return _CURVED(f, dataclasses.replace(curve, turns=()), x)


_CURVED = curves.curved


@pytest.mark.parametrize(("where", "name", "broken"), [
    (steps.Affine, "interval", _swapped), (steps.Affine, "interval", _no_bias),
    (steps.Affine, "back", _forgetful), (steps, "lower_line", _chord),
    (curves, "curved", _without_turns),
    (steps.MaxPool, "back", lambda self, a: (
        [torch.zeros(*a.shape[:2], *self.inputs[0].shape[1:]).double()],
        steps.dot(a, self.upper)))])
def test_a_broken_rule_is_caught(monkeypatch: pytest.MonkeyPatch, where: Any, name: str,
                                 broken: Any) -> None:
    model, x, threat = _deep()
    monkeypatch.setattr(where, name, broken)

    def checked() -> None:
        for eps in (threat.eps, 1e-5):
            sound(model, x, qg.Threat(eps=eps))
        _lines()
    with pytest.raises(AssertionError, match=r"below|above"):
        checked()
