"""Certificates agree with exact margins, by enumeration or in closed form."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from bounded_nets import (
    images,
    model_input,
    quantizer,
    true_margin,
)
from oracle import EPS, Problem
from torch import nn

import quantguard as qg
from quantguard.certification.graph.graph import model_graph
from quantguard.certification.propagation import around, propagate


@pytest.mark.parametrize("seed", range(6))
def test_enumeration_of_all_quantized_inputs_finds_every_certified_image_robust(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    levels = qg.QuantActivation.from_thresholds([0.25, 0.5, 0.75], 0.4)
    deep = seed % 2 == 1
    hidden: list[nn.Module] = [nn.Linear(3, 6), quantizer(2, g)] if deep else []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(levels, *hidden, nn.Linear(6 if deep else 3, 3)).eval()
    x, eps = images(300, seed, (3,)), 0.06
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))  # so that every class occurs
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
    if not deep:  # one layer in margin form: only rounding is lost
        assert truth == pytest.approx(lower["ibp"], abs=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_problem_is_certified_exactly_where_its_margin_says(norm: str) -> None:
    problem = Problem(norm)
    result = qg.certify(problem.linear(), [(problem.x, problem.y)],
                        qg.Threat(norm, problem.eps), progress=False)
    margin = problem.margin.numpy()
    assert result.certified[margin > 1.001 * EPS[norm]].all()
    assert not result.certified[margin <= EPS[norm]].any()
    # A quantizer in between does not change the decision.
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
        lambda v: model(model_input(v, threat)).sum(0), x)[:, 0].flatten(1)  # type: ignore[no-untyped-call]
    reach = 0.3 * jacobian.norm(dim=1)
    with torch.no_grad():
        y = model(model_input(x, threat))
        box = propagate(model_graph(model, threat, None, x), around(x, threat))
    for bound, exact in ((box.upper, y + reach), (box.lower, y - reach)):
        assert torch.allclose(bound, exact.double(), rtol=0, atol=2e-4)
    assert (box.upper > y + reach).all() and (box.lower < y - reach).all()


def test_independent_float64_code_agrees() -> None:
    g = torch.Generator().manual_seed(7)
    q = [quantizer(2, g), quantizer(3, g)]
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
