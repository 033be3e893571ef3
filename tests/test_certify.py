"""Certificates: bounds hold at every node, against exact enumeration, and against attacks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import EPS, Problem
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard import certification, evaluation, intervals
from quantguard.attacks import Noise
from quantguard.bounds import (
    around,
    boxes,
    branching,
    curves,
    flattened,
    margins,
    propagate,
    propagation,
    steps,
)
from quantguard.bounds.boxes import Box, narrowed
from quantguard.bounds.flat import Flat
from quantguard.certificate import Certificate
from quantguard.data import load_data
from quantguard.demo import train_clean
from quantguard.running import run

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


# ---- the checks that everything here goes through ----

def points(pixels: Tensor, threat: qg.Threat, many: int, seed: int = 0) -> Tensor:
    """Return (many, N, ...) images within the threat: corners, faces and insides."""
    g = torch.Generator().manual_seed(seed)
    shape = (many, *pixels.shape)
    d = 2 * torch.rand(shape, generator=g) - 1
    d[: many // 2] = d[: many // 2].sign()
    d[many // 4 : many // 2] *= (torch.rand(d[many // 4 : many // 2].shape, generator=g) < 0.3)
    if threat.norm == "l2":
        length = d.flatten(2).norm(dim=2).clamp_min(1e-12).reshape(many, -1, *[1] * (d.dim() - 2))
        share = torch.ones(many, *[1] * (d.dim() - 1))
        share[many // 2 :] = torch.rand(many - many // 2, *[1] * (d.dim() - 1), generator=g)
        d = d / length * share
    return (pixels + threat.eps * d).clamp(*threat.bounds)


def attacked(model: nn.Module, pixels: Tensor, labels: Tensor, threat: qg.Threat) -> Tensor:
    """Return (steps * classes, N, ...) images within the threat, led towards each class."""
    found = []
    for target in range(3):
        x = pixels.clone()
        for _ in range(4):
            x.requires_grad_()
            try:
                with torch.enable_grad():
                    y = run(model, _eaten(x, threat))
                    gap = (y.gather(1, labels[:, None])[:, 0] - y[:, target]).sum()
                    (g,) = torch.autograd.grad(gap, x)
            except RuntimeError:  # autograd refuses some writes in place
                g = torch.randn_like(x)
            if threat.norm == "linf":
                x = pixels - threat.eps * g.sign()
            else:
                length = g.flatten(1).norm(dim=1).clamp_min(1e-12)
                x = pixels - threat.eps * g / length.reshape(-1, *[1] * (g.dim() - 1))
            x = x.clamp(*threat.bounds).detach()
            found.append(x)
    return torch.stack(found)


def concrete(flat: Flat, x: Tensor) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph on pixels in float32, yielding what each node computes, when it does."""
    values: dict[fx.Node, Any] = {}
    for node in flat.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        named = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            value: Any = x.clone()
        elif node.op == "output":
            return
        elif node.op == "get_attr":
            value = flat.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
        elif node.op == "call_module":
            value = flat.module(node)(*args, **named)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **named)
        else:
            value = node.target(*args, **named)  # type: ignore[operator]
        values[node] = value
        yield node, value


def inside(value: Tensor, box: Box, where: str) -> None:
    """Fail unless every value lies within its bounds."""
    v = value.double()
    v = v.unflatten(0, (-1, len(box.lower))) if v.dim() == box.lower.dim() else v
    assert not (v < box.lower).any(), f"{where}: below by {(box.lower - v).max():.3g}"
    assert not (v > box.upper).any(), f"{where}: above by {(v - box.upper).max():.3g}"


def around_all(wide: Box, narrow: Box, where: str) -> None:
    """Fail unless bounds enclose others, which may themselves be unknown (NaN)."""
    for off in (wide.lower.double() - narrow.lower, narrow.upper - wide.upper.double()):
        assert not (off > 0).any(), f"{where}: narrower, above or below by {off.max():.3g}"


def sound(model: nn.Module, pixels: Tensor, threat: qg.Threat, many: int = 64,
          seed: int = 0) -> int:
    """Fail where any node, logit or margin leaves its bounds; return how many points were tried."""
    with torch.no_grad():
        flat = flattened(model.eval(), threat, None, pixels)
        found: dict[fx.Node, Any] = {}
        labels = run(model, _eaten(pixels, threat)).argmax(1)
        logits = propagate(flat, around(pixels, threat), True, found.__setitem__)
        gaps = [margins(logits, labels, through) for through in (False, True)]
        brief: dict[fx.Node, Any] = {}
        plain = propagate(flat, around(pixels, threat, brief=True), seen=brief.__setitem__)
        gaps.append(margins(plain, labels, False))
        for node, box in brief.items():
            if isinstance(box, Box):
                around_all(box, found[node], f"{node} in {box.lower.dtype}")
        x = points(pixels, threat, many, seed)
        x = torch.cat([x, attacked(model, pixels, labels, threat)])
        many = len(x)
        x = x.flatten(0, 1)
        for node, value in concrete(flat, x):
            if isinstance(found.get(node), Box):
                inside(value, found[node], str(node))
        y = run(model, _eaten(x, threat))
        inside(y, logits, "logits")
        y = y.double().unflatten(0, (many, len(pixels)))
        gap = y.gather(2, labels[:, None].expand(many, -1, -1)) - y
        for number, bound in enumerate(gaps):
            off = (bound - gap)[:, F.one_hot(labels, y.shape[2]) == 0]
            assert not (off > 0).any(), f"margin {number}: below by {off.max():.3g}"
    return len(x)


def lines_hold(ends: tuple[Tensor, Tensor], box: Box, f: Callable[[Tensor], Tensor]) -> None:
    """Fail where a curve of one variable leaves the lines that linear bounds take for it."""
    step, (left, right) = box.step, ends
    assert isinstance(step, steps.Bent)
    for sign in (1, -1):
        values = (sign * step.values[0], sign * step.values[1])
        corners = [(place, sign * value) for place, value in step.corners]
        slope, at = steps.lower_line(step.ends, values, corners)
        for share in torch.linspace(0, 1, 101, dtype=torch.float64):
            z = (left + share * (right - left)).float()
            z = torch.minimum(torch.maximum(z, narrowed(left, True)), narrowed(right, False))
            off = slope * z.double() + at - step.error - sign * f(z.clone()).double()
            assert not (off > 1e-12).any(), f"line: below by {off.max():.3g}"


def _eaten(pixels: Tensor, threat: qg.Threat) -> Tensor:
    from quantguard.batches import from_pixels
    return from_pixels(pixels, threat)


# ---- random networks ----

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.2), "leaky, falling": lambda: nn.LeakyReLU(-0.4),
    "prelu": nn.PReLU, "gelu": nn.GELU, "gelu tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU,
    "mish": nn.Mish, "hardswish": nn.Hardswish, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "softplus, early": lambda: nn.Softplus(2.0, 0.5), "elu": nn.ELU,
    "selu": nn.SELU, "celu": lambda: nn.CELU(0.7), "hardtanh": lambda: nn.Hardtanh(-0.4, 0.3),
    "hardsigmoid": nn.Hardsigmoid, "softsign": nn.Softsign, "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink, "softshrink": lambda: nn.Softshrink(0.1)}


def staircase(bits: int, g: torch.Generator, channels: int = 0, dynamic: bool = False,
              function: nn.Module | None = None) -> nn.Module:
    """Return a staircase with uneven thresholds, per channel where channels are given."""
    m = 2**bits - 1
    rows = (channels,) if channels else ()
    t = (torch.rand(*rows, m, generator=g) + 0.05).cumsum(-1) * 1.2 / m - 0.4
    step = torch.rand(rows, generator=g) + 0.3
    q = qg.QuantActivation(qg.QuantSpec(bits, dynamic, bool(channels)), function,
                           channels=max(channels, 1))
    q.set_thresholds(t, step if rows else float(step), zero=float(bits % 2))
    if dynamic:
        with torch.no_grad():
            for p in (q.shift, q.log_gaps, q.log_step):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    return q


class Net(nn.Module):
    """A small network out of a list of block names."""

    def __init__(self, blocks: list[str], activations: list[nn.Module], g: torch.Generator) -> None:
        super().__init__()
        self.blocks, self.activations = blocks, nn.ModuleList(activations)
        layers: list[nn.Module] = []
        for block in blocks:
            dense = block == "dense"
            layers.append(nn.Linear(4, 4) if dense else nn.Conv2d(
                8 if block == "cat" else 4, 4, 3, padding=1, bias=block != "bn",
                padding_mode="reflect" if block == "reflect" else "zeros",
                groups=2 if block == "groups" else 1))
        self.first, self.layers = nn.Conv2d(2, 4, 3, stride=1, padding=1), nn.ModuleList(layers)
        self.bn = nn.BatchNorm2d(4)
        self.max, self.average = nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1, padding=1)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn(p.shape, generator=g) * (1.5 / p[0].numel() ** 0.5))
            self.bn.running_mean.copy_(torch.randn(4, generator=g) * 0.2)
            self.bn.running_var.copy_(torch.rand(4, generator=g) + 0.3)
            self.bn.weight.copy_(torch.randn(4, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(2 * x - 1)
        for block, layer, f in zip(self.blocks, self.layers, self.activations, strict=True):
            if block == "residual":
                identity = x
                x = f(layer(x))
                x += identity
                x = x - identity.mean((2, 3), keepdim=True)
            elif block == "cat":
                x = f(layer(torch.cat([x, -x], 1)))
            elif block == "max":
                x = self.max(f(layer(x)))
            elif block == "average":
                x = self.average(f(layer(x)))
            elif block == "bn":
                x = f(self.bn(layer(x)))
            elif block == "gate":
                x = layer(x)
                x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
                x = f(x)
            elif block == "dense":
                x = f(layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())
            elif block == "clamp":
                a, b = f(layer(x)).clamp(-0.5, 0.8).chunk(2, dim=1)
                x = torch.cat((b / 3, a), dim=1)
            else:
                x = f(layer(x))
        x = F.adaptive_max_pool2d(x, 1).view(x.size(0), -1)
        return self.head(x)


BLOCKS = ["plain", "residual", "cat", "max", "average", "bn", "gate", "dense", "clamp", "reflect",
          "groups"]
QUANTIZERS = ["1 bit", "2 bits", "3 bits", "4 bits", "2 dynamic", "2 per channel", "2 after gelu"]


def activation(name: str, g: torch.Generator) -> nn.Module:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    bits, how = int(name[0]), name[2:]
    return staircase(bits, g, 4 if how == "per channel" else 0, how == "dynamic",
                     nn.GELU() if how == "after gelu" else nn.ReLU())


def random_net(names: list[tuple[str, str]], seed: int) -> Net:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net([b for b, _ in names], [activation(a, g) for _, a in names], g).eval()


def images(n: int, seed: int, shape: tuple[int, ...] = (2, 5, 5)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


nets = st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from([*ACTIVATIONS, *QUANTIZERS,
                                                                   *QUANTIZERS])),
                min_size=1, max_size=3)


@EXAMPLES
@given(names=nets, seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 1e-3, 0.02, 0.2]),
       norm=st.sampled_from(["linf", "l2"]))
def test_nothing_in_a_random_network_leaves_its_bounds(
        names: list[tuple[str, str]], seed: int, eps: float, norm: str) -> None:
    threat = qg.Threat(norm, eps, mean=(0.4, 0.6), std=(0.5, 0.3))
    assert sound(random_net(names, seed), images(4, seed), threat, 988, seed) == 4000


@pytest.mark.slow
@settings(parent=EXAMPLES, max_examples=250)
@given(names=nets, seed=st.integers(0, 10**6), eps=st.sampled_from([1e-4, 0.01, 0.05, 0.3]),
       norm=st.sampled_from(["linf", "l2"]))
def test_nothing_in_a_million_points_leaves_its_bounds(
        names: list[tuple[str, str]], seed: int, eps: float, norm: str) -> None:
    assert sound(random_net(names, seed), images(4, seed), qg.Threat(norm, eps), 1000,
                 seed) == 4048


@pytest.mark.parametrize("name", sorted({*ACTIVATIONS, *QUANTIZERS} - {"relu in place"}))
def test_every_activation_holds_and_is_tight(name: str) -> None:
    f = activation(name, torch.Generator().manual_seed(1)).eval()
    model = nn.Sequential(nn.Unflatten(1, (4, 2)), f, nn.Flatten())
    g = torch.Generator().manual_seed(2)
    x = 6 * torch.rand(400, 8, generator=g) - 3
    threat = qg.Threat(eps=0.7, bounds=(-3, 3))
    assert sound(model, x, threat, 188) == 80_000
    with torch.no_grad():
        flat = flattened(model, threat, None, x)
        box = propagate(flat, around(x, threat))
        grid = torch.linspace(0, 1, 2001)
        low, high = (x - 0.7).clamp(min=-3), (x + 0.7).clamp(max=3)
        least = torch.full_like(x, torch.inf)
        most = -least
        for share in grid:
            y = model(low + share * (high - low))
            least, most = torch.minimum(least, y), torch.maximum(most, y)
    assert (least - box.lower).max() < 0.25 if "early" in name else 3e-3
    assert (box.upper - most).max() < 0.25 if "early" in name else 3e-3


# ---- broken twins: each is caught by the same check ----

def _deep() -> tuple[Net, Tensor, qg.Threat]:
    names = [("residual", "2 bits"), ("bn", "gelu"), ("average", "relu"), ("plain", "leaky")]
    return random_net(names, 5), images(4, 5), qg.Threat(eps=0.05)


def test_the_twins_are_sound_before_they_are_broken() -> None:
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
        x = Box(left, right)
        with torch.no_grad():
            if isinstance(f, qg.QuantActivation):
                box = curves.quantized(f, x)
            else:
                box = curves.prelu(x, f.weight) if isinstance(f, nn.PReLU) \
                    else curves.activated(f, x)
            lines_hold((left, right), box, f)


def _swapped(self: Any) -> Box:
    box = _BOX(self)
    return Box(box.upper, box.lower, box.step, box.ball)


_BOX = steps.Affine.box


def _no_bias(self: Any) -> Box:
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


def _untouched_by_turns(f: Any, curve: Any, x: Box) -> Box:
    import dataclasses
    return _CURVED(f, dataclasses.replace(curve, turns=()), x)


_CURVED = curves.curved


@pytest.mark.parametrize(("where", "name", "broken"), [
    (steps.Affine, "box", _swapped), (steps.Affine, "box", _no_bias),
    (steps.Affine, "back", _forgetful), (steps, "lower_line", _chord),
    (curves, "curved", _untouched_by_turns),
    (steps.Largest, "back", lambda self, a: (
        [torch.zeros(*a.shape[:2], *self.inputs[0].shape[1:]).double()],
        steps.dot(a, self.upper)))])
def test_a_broken_twin_is_caught(monkeypatch: pytest.MonkeyPatch, where: Any, name: str,
                                 broken: Any) -> None:
    model, x, threat = _deep()
    monkeypatch.setattr(where, name, broken)

    def checked() -> None:
        for eps in (threat.eps, 1e-5):
            sound(model, x, qg.Threat(eps=eps))
        _lines()
    with pytest.raises(AssertionError, match=r"below|above"):
        checked()


# ---- rounding ----

def _cancelling() -> tuple[nn.Module, Tensor]:
    """Sums of large numbers that nearly cancel: what is left is mostly rounding."""
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
    monkeypatch.setattr(boxes, "gamma", lambda n: 1e-30)
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
        flat = flattened(layers.eval(), qg.Threat(eps=0.1), None, x)
        for brief in (False, True):
            with torch.no_grad():
                logits = propagate(flat, around(x, qg.Threat(eps=0.1), brief=brief))
                lower = margins(logits, torch.zeros(2).long(), False)
            assert lower[:, 1].isnan().all()


def _normed_overflow() -> nn.Module:
    """A sum that overflows, and a BatchNorm that would make it small again."""
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
    box = curves.quantized(q, Box(t.double().reshape(1, 1), just_above.reshape(1, 1)))
    assert box.lower == box.upper == 0
    box = curves.quantized(q, Box(just_above.reshape(1, 1), just_above.reshape(1, 1) + 1))
    assert box.lower == box.upper == 1


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "prelu"])
def test_activations_round_by_less_than_a_quarter_of_their_slack(name: str) -> None:
    f = ACTIVATIONS[name]().eval()
    x = torch.cat([torch.linspace(-30, 30, 200_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    x = x[:, None]
    with torch.no_grad():
        exact = f(x.double().clone())
        box = curves.activated(f, Box(x.double(), x.double()))
        off = (f(x.clone()).double() - exact).abs()
    assert (off <= (box.upper - exact) / (1.01 if "early" in name else 4) + 0).all()


# ---- exact truth ----

def true_margin(model: nn.Module, levels: qg.QuantActivation, image: Tensor, label: int,
                eps: float) -> float:
    """Return the smallest margin over all that a network sees of images within eps."""
    reach = [torch.unique(levels(torch.linspace(max(0, float(v) - eps), min(1, float(v) + eps),
                                                4001))) for v in image]
    with torch.no_grad():
        z = model[1:](torch.tensor(list(itertools.product(*[r.tolist() for r in reach]))))
    others = z.clone()
    others[:, label] = -torch.inf
    return float((z[:, label] - others.amax(1)).min())


@pytest.mark.parametrize("seed", range(6))
def test_enumeration_of_all_quantized_inputs_finds_every_certified_image_robust(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    levels = qg.QuantActivation.from_thresholds([0.25, 0.5, 0.75], 0.4)
    deep = seed % 2 == 1
    hidden: list[nn.Module] = [nn.Linear(3, 6), staircase(2, g)] if deep else []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(levels, *hidden, nn.Linear(6 if deep else 3, 3)).eval()
    x, eps = images(300, seed, (3,)), 0.06
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))  # every class somewhere
        y = model(x).argmax(1)
    lower = {method: qg.certify(model, [(x, y)], qg.Threat(eps=eps), method=method,
                                progress=False).lower for method in ("ibp", "crown", "auto")}
    truth = np.empty(300)
    for i, image in enumerate(x):
        truth[i] = true_margin(model, levels, image, int(y[i]), eps)
    for found in lower.values():
        assert (found <= truth).all()
        assert 0 < (found > 0).sum() < 300
    assert (truth <= 0).any()
    if not deep:  # one layer in margin form: nothing is lost but rounding
        assert truth == pytest.approx(lower["ibp"], abs=1e-4)


def quantized_inputs(seed: int) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """Return a network of three inputs with eight levels each, images, labels, true margins."""
    g = torch.Generator().manual_seed(seed)
    levels = qg.QuantActivation.from_thresholds([i / 8 for i in range(1, 8)], 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = 12 if seed == 2 else 0
        model = nn.Sequential(levels, nn.Linear(3, 12), staircase(2, g, channels),
                              nn.Linear(12, 12), staircase(2, g, channels, seed == 1),
                              nn.Linear(12, 3)).eval()
    x = images(100, seed, (3,))
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    return model, x, y, np.array([true_margin(model, levels, image, int(label), 0.15)
                                  for image, label in zip(x, y, strict=True)])


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_branch_and_bound_certifies_all_that_is_robust(seed: int) -> None:
    model, x, y, truth = quantized_inputs(seed)
    whole, cut = (qg.certify(model, [(x, y)], qg.Threat(eps=0.15), splits=splits, progress=False)
                  for splits in (0, 2000))
    assert whole.certified.sum() < cut.certified.sum() == (truth > 1e-3).sum()
    assert (cut.certified == (truth > 0)).all() and (cut.lower <= truth).all()


def test_half_of_each_cut_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, truth = quantized_inputs(0)
    halves = branching._Look.halves
    monkeypatch.setattr(branching._Look, "halves", lambda look, row: halves(look, row)[:1])
    # and nobody attacks what is in the other half
    monkeypatch.setattr(certification, "PGD", lambda *args, **settings: Noise("linf", 1))
    found = qg.certify(model, [(x, y)], qg.Threat(eps=0.15), splits=2000, progress=False)
    assert (found.certified & (truth <= 0)).any()


@pytest.mark.parametrize(("axis", "shape"), [
    (1, (3,)), (-1, (3,)), (1, (3, 2)), (-1, (2, 3)), (2, (2, 3)), (1, (3, 2, 2)), (-1, (2, 2, 3)),
    (-3, (3, 2, 2))])
def test_a_cut_is_at_the_thresholds_of_its_channel(axis: int, shape: tuple[int, ...]) -> None:
    levels = qg.QuantActivation(qg.QuantSpec(2, per_channel=True), channels=3, axis=axis)
    thresholds = (torch.arange(9.0).reshape(3, 3) + 1) / 10
    levels.set_thresholds(thresholds, 0.2)
    many = int(np.prod(shape))
    model = nn.Sequential(nn.Unflatten(1, shape), levels, nn.Flatten(), nn.Linear(many, 2)).eval()
    flat = flattened(model, qg.Threat(), None, torch.zeros(1, many))
    whole = branching._Part(torch.zeros(1, many), torch.ones(1, many), {}, 0.0)
    look = branching._Look(flat, [whole], torch.zeros(1, dtype=torch.long))
    (node,) = look.inputs
    rows = torch.arange(3).reshape([-1 if d == axis % (len(shape) + 1) - 1 else 1
                                    for d in range(len(shape))]).expand(shape).flatten()
    for element, row in enumerate(rows.tolist()):
        assert torch.equal(look._between(0, node, element), thresholds[row].double())
    x = torch.rand(8, many, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    qg.certify(model, [(x, y)], qg.Threat(eps=0.05), splits=20, progress=False)


def test_cuts_close_the_bracket_of_a_net_of_few_inputs(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400, 4, generator=g)
    y = ((x[:, 0] - 0.5) * (x[:, 1] - 0.5) > 0).long() + (x[:, 2] > 0.6).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                              nn.Linear(32, 3))
        train_clean(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 50),
                    40, progress=False)
    loader, threat = [(x[:100], y[:100])], qg.Threat(eps=0.05)
    attacked = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    whole, cut = (qg.certify(model, loader, threat, splits=splits, progress=False)
                  for splits in (0, 5000))
    assert whole.certified.sum() < cut.certified.sum()
    assert (cut.certified <= attacked.survived).all()
    assert cut.certified.sum() >= attacked.survived.sum() - 1
    assert Certificate.from_dict(cut.to_dict()).splits == 5000
    again = qg.certify(model, loader, threat, splits=5000, progress=False, run_dir=tmp_path)
    more = qg.certify(model, loader, threat, splits=5000, progress=False, run_dir=tmp_path)
    assert (again.certified == cut.certified).all() and (more.lower == again.lower).all()
    none = qg.certify(model, loader, threat, splits=5000, progress=False, budget=1e-6)
    assert (none.certified <= cut.certified).all()
    for threat, splits in ((qg.Threat("l2", 0.1), 3), (qg.Threat(), -1)):
        with pytest.raises(qg.SpecError, match="splits"):
            qg.certify(model, loader, threat, splits=splits)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_problem_is_certified_exactly_where_its_margin_says(norm: str) -> None:
    problem = Problem(norm)
    result = qg.certify(problem.linear(), [(problem.x, problem.y)],
                        qg.Threat(norm, problem.eps), progress=False)
    margin = problem.margin.numpy()
    assert result.certified[margin > 1.001 * EPS[norm]].all()
    assert not result.certified[margin <= EPS[norm]].any()
    # A staircase in between does not change the decision.
    stairs = qg.certify(problem.staircase(0.1), [(problem.x, problem.y)],
                        qg.Threat(norm, problem.eps), progress=False)
    assert (stairs.certified == result.certified).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_an_l2_ball_passes_the_first_convolution_exactly(stride: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, stride, 1, groups=1),
                              nn.Flatten()).eval()
    model[0].running_var.copy_(torch.tensor([0.5, 2.0]))
    x, threat = images(2, 0, (2, 6, 6)) * 0.2 + 0.4, qg.Threat("l2", 0.3, std=(0.5, 2.0))
    jacobian = torch.autograd.functional.jacobian(
        lambda v: model(_eaten(v, threat)).sum(0), x)[:, 0].flatten(1)  # type: ignore[no-untyped-call]
    reach = 0.3 * jacobian.norm(dim=1)
    with torch.no_grad():
        y = model(_eaten(x, threat))
        box = propagate(flattened(model, threat, None, x), around(x, threat))
    for bound, exact in ((box.upper, y + reach), (box.lower, y - reach)):
        assert torch.allclose(bound, exact.double(), rtol=0, atol=2e-4)
    assert (box.upper > y + reach).all() and (box.lower < y - reach).all()


def test_independent_float64_code_agrees() -> None:
    g = torch.Generator().manual_seed(7)
    q = [staircase(2, g), staircase(3, g)]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), q[0], nn.Flatten(), nn.Linear(64, 12), q[1],
                              nn.Linear(12, 4)).eval()
    x = images(100, 7, (1, 8, 8))
    with torch.no_grad():
        y = model(x).argmax(1)
        result = qg.certify(model, [(x, y)], qg.Threat(eps=0.01), method="ibp", progress=False)
        low, high = ((x.double() + d).clamp(0, 1) for d in (-0.01, 0.01))
        for layer in model[:-1]:
            if isinstance(layer, nn.Flatten):
                low, high = low.flatten(1), high.flatten(1)
            elif isinstance(layer, qg.QuantActivation):
                t = layer.thresholds.double()
                low, high = ((((v[..., None] > t).sum(-1).float() - layer.zero)
                              * layer.step).double() for v in (low, high))
            else:
                w = copy.deepcopy(layer).double()
                plus, minus = copy.deepcopy(w), copy.deepcopy(w)
                plus.weight.data.clamp_(min=0)
                minus.weight.data.clamp_(max=0)
                minus.bias.data.zero_()
                low, high = plus(low) + minus(high), plus(high) + minus(low)
        w, b = model[-1].weight.double(), model[-1].bias.double()
        gap = w[y][:, None] - w[None]
        worst = (gap.clamp(min=0) * low[:, None] + gap.clamp(max=0) * high[:, None]).sum(2) \
            + b[y][:, None] - b[None]
    worst[torch.arange(100), y] = torch.inf
    exact = worst.amin(1).numpy()
    assert (result.lower <= exact + 1e-12).all()
    assert np.median(exact - result.lower) < 1e-4
    assert 0 < result.certified.sum() < 100


# ---- models as people write them ----

class Writes(nn.Module):
    """A residual block whose ``+=`` changes what another name still holds."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.conv, self.head, self.apart = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(50, 3), apart

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        other = x if not self.apart else x[:, :]
        x += self.conv(x)
        return self.head((x * 2 - other).relu_().flatten(1))


def test_a_write_in_place_is_seen_by_all_who_read_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, apart = Writes(False), Writes(True)
    assert sound(model, images(4, 0), qg.Threat(eps=0.01))
    with pytest.raises(qg.ConversionError, match="writes over what is read again"):
        flattened(apart, qg.Threat(), None, images(4, 0))
    own = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(50, 3))
    with pytest.raises(qg.ConversionError, match=r"0 \(ReLU\) writes over the images"):
        flattened(own, qg.Threat(), None, images(4, 0))
    assert sound(own.eval(), images(4, 0), qg.Threat(mean=(0.5,), std=(0.5,)))


def test_converted_models_are_certified_as_they_are(cnn: nn.Module, digits: Any) -> None:
    x, _ = digits
    for bits, dynamic, per_channel in ((2, True, False), (3, False, True), (1, False, False)):
        model = qg.convert(cnn, bits, dynamic=dynamic, per_channel=per_channel)
        assert sound(model, x[:8], qg.Threat(eps=1e-3), 16)
        with qg.bypass(model):
            assert sound(model, x[:8], qg.Threat(eps=1e-3), 4)


def test_converted_layers_of_torch_are_traced_through() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Conv2d(4, 3, 3), nn.PReLU(),
                              nn.Flatten(), nn.Linear(3, 3)).eval()
        linear = nn.Linear(3, 3).eval()
    x = images(8, 0)
    for per_channel in (False, True):
        converted = qg.convert(model, 3, data=[x], per_channel=per_channel)
        assert sound(converted, x, qg.Threat(eps=0.01))
        with torch.no_grad():
            y = converted(x).argmax(1)
        found = qg.certify(converted, [(x, y)], qg.Threat(eps=1e-4), progress=False)
        assert found.certified.any() and len(found.sites) == 2
        with qg.bypass(converted):
            assert sound(converted, x, qg.Threat(eps=0.01), 4)
    entered = qg.convert(linear, 32, input_bits=2, input_range=(0.0, 1.0),
                         example=images(2, 0, (3,)))
    assert sound(entered, images(8, 0, (3,)), qg.Threat(eps=0.01))


class Notes(nn.Module):
    """A forward that conversion cannot hold in a graph: its calls are intercepted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.head(F.relu(F.relu(self.conv(x)) - 0.1).flatten(1))


def test_intercepted_staircases_are_certified_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = qg.convert(Notes().eval(), 2, example=images(2, 0))
    assert "by interception" in str(qg.inspect(Notes(), example=images(2, 0)))
    assert sound(model, images(4, 0), qg.Threat(eps=0.01))
    x = images(8, 0)
    with torch.no_grad():
        y = model(x).argmax(1)
    assert len(qg.certify(model, [(x, y)], qg.Threat(eps=0.01), progress=False).sites) == 2


def test_the_same_answer_under_a_normalisation(cnn: nn.Module, digits: Any) -> None:
    x, y = digits
    x, y = x[:40], y[:40]

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cnn

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model((images - 0.2) / 0.4)}
    threat = qg.Threat(eps=5e-4, mean=(0.2,), std=(0.4,))
    a = qg.certify(cnn, [((x - 0.2) / 0.4, y)], threat, progress=False)
    b = qg.certify(Pixels(), [{"images": x, "labels": y}], qg.Threat(eps=5e-4), progress=False)
    assert a.lower == pytest.approx(b.lower, abs=1e-3) and a.image_hash == b.image_hash
    assert (a.certified == b.certified).all()


def _with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(50, 6), layer), nn.Linear(6, 3))


class Calls(nn.Module):
    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f, self.head = f, nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Any:
        return self.f(self.head(x.flatten(1)))


@pytest.mark.parametrize(("model", "words"), [
    (_with(nn.LayerNorm(6)), "one operation has no rule: 1.1 .LayerNorm."),
    (nn.Sequential(_with(nn.Softmax(1)), nn.GroupNorm(1, 3)),
     "2 operations have no rule: 0.1.1 .Softmax., 1 .GroupNorm."),
    (Calls(lambda x: x.sort(1)[0]), "sort at tests/test_certify.py"),
    (Calls(lambda x: x.T.contiguous().T), "getattr at"),
    (Calls(lambda x: x - x.mean(0)), "across images"),
    (Calls(lambda x: x.view(-1, 1) * 2), "mixes images"),
    (Calls(lambda x: x if x.sum() > 0 else -x), "cannot be traced into one graph"),
    (Calls(lambda x: x + torch.rand(3)), "random numbers"),
    (Calls(lambda x: x.half().float()), "half at"),
    (Calls(lambda x: x[0]), "index over images"),
    (_with(nn.Hardshrink()), r"1.1 \(Hardshrink\) cannot be bounded"),
    (_with(nn.BatchNorm1d(6, track_running_stats=False)), "looks at its batch"),
    (_with(nn.Identity()).double(), "float64"),
    (Calls(lambda x: x.unsqueeze(1)), "logits"),
])
def test_what_has_no_rule_is_named(model: nn.Module, words: str) -> None:
    x = images(2, 0)
    with pytest.raises(qg.ConversionError, match=words), torch.no_grad():
        propagate(flattened(model.eval(), qg.Threat(), None, x), around(x, qg.Threat()))


class Named(nn.Module):
    """A call with its arguments by name, between a convolution and a linear layer."""

    def __init__(self, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.call = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), call
        self.levels = qg.QuantActivation.from_thresholds([-0.2, 0.0, 0.2], 0.2)
        self.slope = nn.Parameter(torch.tensor([0.2]))
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Any:
        y = self.call(self, self.norm(input=self.conv(input=x)))
        return self.head(input=torch.flatten(input=y, start_dim=1))


BY_NAME: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda m, x: F.relu(input=x), "written": lambda m, x: F.relu(inplace=True, input=x),
    "staircase": lambda m, x: m.levels(x=x), "both": lambda m, x: m.levels(value=x.relu(), x=x),
    "sum": lambda m, x: torch.sum(x, axis=1), "means": lambda m, x: x.mean(axis=(2, 3)),
    "largest": lambda m, x: torch.amax(input=x, dim=1, keepdim=True),
    "permute": lambda m, x: x.permute(dims=(0, 2, 3, 1)),
    "permuted": lambda m, x: torch.permute(dims=(0, 3, 1, 2), input=x),
    "split": lambda m, x: x.split(split_size=3, dim=1)[0],
    "splits": lambda m, x: torch.split(x, split_size_or_sections=[1, 3], dim=1)[1],
    "chunk": lambda m, x: torch.chunk(input=x, chunks=2, dim=1)[0],
    "cat": lambda m, x: torch.cat(tensors=[x, x], axis=1),
    "reshape": lambda m, x: torch.reshape(input=x, shape=(-1, 36)),
    "view": lambda m, x: x.view(size=(-1, 4, 9)), "transpose": lambda m, x:
    torch.transpose(dim1=2, dim0=1, input=x), "unsqueeze": lambda m, x: x.unsqueeze(dim=1),
    "add": lambda m, x: torch.add(other=x, input=m.levels(x)), "sub": lambda m, x: x.sub(other=1.5),
    "div": lambda m, x: torch.div(input=x, other=3.0), "clamp": lambda m, x:
    torch.clamp(input=x, min=-0.1, max=0.2), "pad": lambda m, x: F.pad(input=x, pad=(1, 1)),
    "pool": lambda m, x: F.max_pool2d(input=x, kernel_size=2), "average": lambda m, x:
    F.avg_pool2d(input=x, kernel_size=2, stride=1), "prelu": lambda m, x:
    F.prelu(input=x, weight=m.slope), "leaky": lambda m, x:
    F.leaky_relu(negative_slope=0.2, input=x), "softplus": lambda m, x: F.softplus(input=x, beta=2),
    "convolution": lambda m, x: F.conv2d(input=x, weight=m.conv.weight.repeat(1, 2, 1, 1),
                                         padding=1),
}


@pytest.mark.parametrize("what", BY_NAME)
def test_arguments_may_be_given_by_name(what: str) -> None:
    x, threat = images(4, 0), qg.Threat(eps=0.01)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Named(BY_NAME[what]).eval()
        y = model(x).argmax(1)
    assert sound(model, x, threat)
    qg.certify(model, [(x, y)], threat, progress=False)
    trained = intervals.graph_of(model, threat, None, x)
    with torch.no_grad():
        logits = intervals.propagate(trained, intervals.around(x, 0.01, (0.0, 1.0)))
    inside(model(x).detach(), Box(logits.lower.double() - 1e-5, logits.upper.double() + 1e-5), what)


def test_hooks_on_layers_are_named_and_those_of_the_root_are_followed() -> None:
    model = _with(nn.ReLU()).eval()
    model.register_forward_pre_hook(lambda module, args: (args[0].clamp(0.2, 0.8),))
    assert sound(model, images(4, 0), qg.Threat(eps=0.3))
    model[1][0].register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(qg.ConversionError, match=r"1.0 \(Linear\), which has hooks"):
        flattened(model, qg.Threat(), None, images(4, 0))
    patched = _with(nn.ReLU()).eval()
    patched[1][0].forward = lambda x: F.linear(x, patched[1][0].weight)
    with pytest.raises(qg.ConversionError, match=r"1.0 \(Linear\), .* its own forward"):
        flattened(patched, qg.Threat(), None, images(4, 0))


class Moody(nn.Module):
    """Answers otherwise where a graph is not looking."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x.flatten(1))
        return y if isinstance(x, fx.Proxy) else y + 1


def test_a_model_that_is_not_its_graph_is_found_out() -> None:
    x = images(8, 0)
    with pytest.raises(qg.ConversionError, match="does not compute what its graph says"):
        qg.certify(Moody(), [(x, torch.zeros(8).long())], progress=False)


# ---- the verb ----

@pytest.fixture(scope="module")
def trained(train_digits: Any, digits: Any) -> tuple[nn.Module, list[Any]]:
    """A 2-bit perceptron of digits, of which a part can be certified, and 100 test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        loader = torch.utils.data.DataLoader(train_digits, batch_size=64)
        train_clean(model, loader, 15, progress=False)
        model = qg.convert(model, 2, data=loader)
    x, y = digits
    return model, [(x[:60], y[:60]), (x[60:100], y[60:100])]


def test_no_certified_image_is_broken(trained: Any, untouched: Any) -> None:
    model, loader = trained
    threat = qg.Threat(eps=0.02)
    with untouched(model):
        certificate = qg.certify(model, loader, threat, progress=False)
    evaluation = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    assert 10 < certificate.certified.sum() < certificate.correct.sum()
    assert (certificate.certified <= evaluation.survived).all()
    assert (certificate.correct == evaluation.correct).all()
    assert certificate.image_hash == evaluation.image_hash
    wider = qg.certify(model, loader, qg.Threat(eps=0.03), progress=False)
    assert (wider.certified <= certificate.certified).all() and (wider.lower
                                                                 <= certificate.lower).all()


def test_methods_agree_on_what_they_share(trained: Any) -> None:
    model, loader = trained
    by = {method: qg.certify(model, loader, qg.Threat(eps=0.02), method=method, progress=False)
          for method in ("ibp", "crown", "auto")}
    assert (by["crown"].lower >= by["ibp"].lower).all()
    assert (by["auto"].certified == by["crown"].certified).all()
    assert by["crown"].certified.sum() >= by["ibp"].certified.sum()
    (share,) = by["ibp"].sites.values()
    assert list(by["ibp"].sites) == ["2"] and 0 < share < 1
    at_rest = qg.certify(model, loader, qg.Threat(eps=0), method="ibp", progress=False)
    assert at_rest.sites["2"] > 0.99 and (at_rest.certified == at_rest.correct).all()


def test_a_certificate_prints_and_is_the_json_it_writes(trained: Any, tmp_path: Path) -> None:
    model, loader = trained
    result = qg.certify(model, loader, qg.Threat("l2", 0.1), images=50, progress=False)
    assert result.images == 50 and "Robust accuracy >= " in str(result)
    assert "intervals on one step" in str(result) and "L2, eps 0.1" in str(result)
    assert "<pre>" in result._repr_html_()
    low, high = result.interval
    assert low <= result.certified_accuracy <= high and result.clean_accuracy > 0.8
    result.save(tmp_path / "c.json")
    again = Certificate.load(tmp_path / "c.json")
    assert again.to_dict() == result.to_dict() and (again.lower == result.lower).all()
    assert again.threat == result.threat and (again.certified == result.certified).all()
    with pytest.raises(qg.DataError, match="no certificate JSON"):
        Certificate.from_dict({"format": 1})
    with pytest.raises(qg.DataError, match="cannot be read"):
        Certificate.load(tmp_path / "none.json")


def test_a_run_directory_goes_on_from_where_it_stopped(
        trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantguard import certification
    model, loader = trained
    whole = qg.certify(model, loader, qg.Threat(eps=0.02), progress=False)
    count, real = 0, certification.margins

    def interrupted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(certification, "margins", interrupted)
    monkeypatch.setattr(certification, "_BATCHES", 1)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 64 of 100"):
        qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path, progress=False)
    again = qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path, progress=False)
    assert (again.lower == whole.lower).all() and again.sites == whole.sites
    before = count
    assert (qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path,
                       progress=False).lower == whole.lower).all()
    assert count == before
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(model, loader, qg.Threat(eps=0.03), run_dir=tmp_path, progress=False)


def test_what_there_is_no_time_for_is_not_certified(trained: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from quantguard import certification
    monkeypatch.setattr(certification, "_BATCHES", 1)
    model, loader = trained
    result = qg.certify(model, loader, qg.Threat(eps=0), budget="0.001s", progress=False)
    assert result.skipped == 100 - (result.lower > -np.inf).sum() > 0
    assert "left out for lack of time" in str(result)
    assert not result.certified[~np.isfinite(result.lower)].any()
    assert None in json.loads(json.dumps(result.to_dict()))["lower"]


def test_on_the_command_line(trained: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from quantguard.cli import main
    qg.save(trained[0], tmp_path / "model.qg")
    arguments = ["certify", str(tmp_path / "model.qg"), "--trust", "--data", "digits", "--eps",
                 "0.02", "--images", "100", "--json", str(tmp_path / "c.json"), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Robust accuracy >= " in result.output, result.output
    cut = CliRunner().invoke(main, [*arguments[:-1], "--splits", "2"])
    assert cut.exit_code == 0 and "Robust accuracy >= " in cut.output, cut.output
    told = Certificate.load(tmp_path / "c.json")
    images = Subset(load_data("digits", "test").dataset, told.sample["indices"])
    again = qg.certify(trained[0], DataLoader(images, batch_size=64), qg.Threat(eps=0.02),
                       progress=False)
    assert (told.certified == again.certified).all()
    result = CliRunner().invoke(main, [*arguments, "--method", "best"])
    assert result.exit_code == 1 and "Error: method='best' is unknown" in result.output


def test_wrong_settings_and_data_are_said(trained: Any) -> None:
    model, loader = trained
    x, y = loader[0]
    with pytest.raises(qg.SpecError, match="method='best' is unknown"):
        qg.certify(model, loader, method="best")
    with pytest.raises(qg.DataError, match="has no labels"):
        qg.certify(model, [x], progress=False)
    with pytest.raises(qg.DataError, match="NaN"):
        qg.certify(model, [(x * float("nan"), y)], progress=False)
    with pytest.raises(qg.DataError, match="10 outputs"):
        qg.certify(model, [(x, y + 8)], progress=False)
    with pytest.raises(qg.ConversionError, match="softened"), qg.soften(model, 4):
        qg.certify(model, loader, progress=False)


@pytest.mark.parametrize(("settings", "words"), [
    ({"images": 1.5}, "images=1.5 must be a whole number"), ({"images": 0}, "at least 1"),
    ({"images": "9"}, "images='9' must be"), ({"splits": "20"}, "splits='20' in linf"),
    ({"splits": 1.5}, "splits=1.5"), ({"splits": None}, "splits=None")])
def test_numbers_that_are_none_are_said_before_work(settings: Any, words: str) -> None:
    with pytest.raises(qg.SpecError, match=words):
        qg.certify(nn.Linear(2, 2), [(None, None)], **settings)  # type: ignore[list-item]


def test_batches_that_differ_are_named() -> None:
    x, y = torch.zeros(2, 1, 6, 6), torch.zeros(2).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(qg.DataError, match=r"batch 1 .* shape \(1, 5, 6\), and batch 0 \(1, 6, 6"):
        qg.certify(model, [(x, y), (x[:, :, 1:], y)], progress=False)
    with pytest.raises(qg.DataError, match="batch 2 .* images as 'pixels', and batch 0 as 'image'"):
        qg.certify(model, [{name: x, "labels": y} for name in ("image", "image", "pixels")],
                   progress=False)
    with pytest.raises(qg.DataError, match="batch 1 .* images by no name, and batch 0 as 'image'"):
        qg.certify(model, [{"image": x, "labels": y}, (x, y)], progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_refused(dtype: torch.dtype, trained: Any) -> None:
    model, loader = trained
    with pytest.raises(qg.ConversionError, match=f"1.weight is {dtype}"):
        qg.certify(copy.deepcopy(model).to(dtype), loader, progress=False)


# ---- the bracket: certified <= true <= attacked ----

@pytest.fixture(scope="module")
def bracket(trained: Any) -> qg.Evaluation:
    model, loader = trained
    return qg.evaluate(model, loader, qg.Threat(eps=0.02), suite="quick", certify=True,
                       progress=False)


def test_the_truth_is_bracketed(trained: Any, bracket: qg.Evaluation, tmp_path: Path) -> None:
    model, loader = trained
    threat = qg.Threat(eps=0.02)
    alone = qg.certify(model, loader, threat, progress=False)
    attacked = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    assert (bracket.certified == alone.certified).all() and bracket.certified.any()
    assert (bracket.survived == attacked.survived).all()
    assert bracket.bracket == (alone.certified_accuracy, attacked.robust_accuracy)
    for result in bracket.attacks:  # what is proven is only attacked by what attacks all
        tried = bool((result.attacked & bracket.certified).any())
        assert tried == bool(result.settings["everywhere"])
    assert [f.raised for f in bracket.flags if f.name == "certificate broken"] == [False]
    text = str(bracket)
    assert text.startswith(f"PROVEN ROBUST: Certified {100 * alone.certified_accuracy:.1f} % <= "
                           "true robust "
                           f"accuracy <= {100 * attacked.robust_accuracy:.1f} % attacked")
    assert "intervals that fall on one step: 2 " in text
    bracket.save(tmp_path / "e.json")
    again = qg.Evaluation.load(tmp_path / "e.json")
    assert str(again) == text and (again.certified == bracket.certified).all()
    replayed = qg.evaluate(model, loader, replay=again, progress=False)
    assert replayed.bracket == bracket.bracket
    assert not attacked.certified.any() and attacked.bracket[0] == 0


def test_nothing_left_open_is_resolved(trained: Any) -> None:
    model, loader = trained
    closed = qg.evaluate(model, loader, qg.Threat(eps=0.001), suite="quick", certify=True,
                         progress=False)
    assert (closed.certified == closed.survived).all() and closed.reliable
    assert "Nothing is left open." in str(closed)


def test_a_false_certificate_is_found_out_by_the_attacks(
        trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluation.certificate_of

    def believing(*args: Any, **options: Any) -> Certificate:
        found = real(*args, **options)
        return dataclasses.replace(found, certified=found.correct)
    monkeypatch.setattr(evaluation, "certificate_of", believing)
    result = qg.evaluate(*trained, qg.Threat(eps=0.2), suite="quick", certify=True, progress=False)
    assert result.refuted and not result.reliable and result.bracket[0] == 0
    assert [f.raised for f in result.flags if f.name == "certificate broken"] == [True]
    assert str(result).startswith("NOT ROBUST: Robust accuracy <= ")
    assert "Please report it" in str(result)


@pytest.mark.slow
def test_a_bracket_goes_on_from_where_it_stopped_and_is_compared(
        trained: Any, bracket: qg.Evaluation, tmp_path: Path) -> None:
    model, loader = trained
    threat, where = qg.Threat(eps=0.02), tmp_path / "run"
    options: dict[str, Any] = {"suite": "quick", "progress": False, "run_dir": where}
    one = qg.evaluate(model, loader, threat, certify=True, **options)
    again = qg.evaluate(model, loader, threat, certify=True, **options)
    assert (again.survived == one.survived).all() and (one.survived == bracket.survived).all()
    with pytest.raises(qg.SpecError, match="Different: what is proven"):
        qg.evaluate(model, loader, threat, **options)
    table = qg.compare({"2 bits": model, "again": model}, loader, threat, suite="quick",
                       certify=True, progress=False)
    assert "certified" in str(table) and "certified" in table._repr_html_()
    recurrent = nn.Sequential(nn.Flatten(), nn.GLU(), nn.Linear(32, 10))
    with pytest.raises(qg.ConversionError, match=r"^gated: .*1.*GLU"):
        qg.compare({"gated": recurrent}, loader, threat, suite="quick", certify=True,
                   progress=False)
    table.save(tmp_path / "page.html")
    assert "true robust accuracy" in (tmp_path / "page.html").read_text()


def test_a_bracket_on_the_command_line(trained: Any, bracket: qg.Evaluation,
                                       tmp_path: Path) -> None:
    from click.testing import CliRunner

    from quantguard.cli import main
    qg.save(trained[0], tmp_path / "model.qg")
    result = CliRunner().invoke(main, [
        "evaluate", str(tmp_path / "model.qg"), "--trust", "--data", "digits", "--eps", "0.02",
        "--images", "100", "--suite", "quick", "--certify", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("PROVEN ROBUST: Certified "), result.output
