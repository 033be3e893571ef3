"""Intervals in training: against the certificate's own, and their gradients."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounded_nets import ACTIVATIONS, BLOCKS, QUANTIZERS, images, norm_net, points, random_net
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification import propagation as bounds
from quantguard.certification import training_propagation as intervals
from quantguard.certification.graph.graph import model_graph
from quantguard.certification.rules import RULES
from quantguard.certification.rules.quantizers import train_quantized
from quantguard.certification.rules.training import TrainInterval, between
from quantguard.certification.training_propagation import graph_of, propagate, worst_case
from quantguard.core.errors import ConversionError
from quantguard.nn.quant_activation import QuantActivation

EPS = 0.05

THREAT = qg.Threat(eps=EPS)

# A softplus with a low threshold jumps, which a certificate counts as rounding.
KINDS = [*(name for name in ACTIVATIONS if name != "softplus, early"), *QUANTIZERS]


def logits_of(model: nn.Module, pixels: Tensor, eps: float = EPS, **threat: Any) -> TrainInterval:
    graph = graph_of(model, qg.Threat(eps=eps, **threat), None, pixels)
    return propagate(graph, intervals.around(pixels, eps, (0.0, 1.0)))


def holds(model: nn.Module, pixels: Tensor) -> None:
    """Check that random points stay inside, and that the certificate's intervals are the same."""
    found = logits_of(model, pixels)
    labels = torch.arange(len(pixels)) % 3
    worst = worst_case(found, labels)
    for x in points(pixels, THREAT, 32):
        y = model(x)
        slack = 1e-4 * (1 + y.abs().amax())
        assert (y >= found.lower - slack).all() and (y <= found.upper + slack).all()
        assert (y - y.gather(1, labels[:, None]) <= worst + slack).all()
    box = bounds.propagate(model_graph(model, THREAT, None, pixels),
                           bounds.around(pixels, THREAT))
    # 1e-3: on a threshold the two could round to different levels, which does not happen here
    torch.testing.assert_close(found.lower.double(), box.lower, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.upper.double(), box.upper, rtol=1e-3, atol=1e-3)
    margins = bounds.margins(box, labels, False)
    others = margins.isfinite()
    torch.testing.assert_close(-worst.double()[others], margins[others], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(len(KINDS)))
@torch.no_grad()
def test_every_block_and_activation_agrees_with_the_certificate(seed: int) -> None:
    names = [(BLOCKS[(seed + i) % len(BLOCKS)], KINDS[(seed + 5 * i) % len(KINDS)])
             for i in (0, 4)]
    holds(random_net(names, seed).eval(), images(3, seed))


def _signed(m: nn.Linear, x: TrainInterval) -> TrainInterval:
    return TrainInterval(m(x.center), F.linear(x.radius, m.weight))


@torch.no_grad()
def test_a_broken_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = random_net([("plain", "relu")], 1).eval(), images(3, 1)
    holds(model, pixels)
    for layer, broken in (
            (nn.Linear, _signed),
            (nn.ReLU, lambda f, x: TrainInterval(f(x.center), f(x.radius)))):
        with monkeypatch.context() as patch:
            patch.setitem(RULES, layer, dataclasses.replace(RULES[layer], training=broken))
            with pytest.raises(AssertionError):
                holds(model, pixels)


@torch.no_grad()
def test_normalised_images_have_the_same_intervals() -> None:
    model, pixels = random_net([("bn", "2 bits")], 3).eval(), images(2, 3)
    mean, std = (0.3, 0.5), (0.2, 0.4)
    scaled = nn.Sequential(_Undo(mean, std), model)
    a, b = logits_of(model, pixels), logits_of(scaled, pixels, mean=mean, std=std)
    torch.testing.assert_close(a.center, b.center, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.radius, b.radius, rtol=1e-3, atol=1e-3)


class _Undo(nn.Module):
    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def test_batchnorm_normalises_centers_as_torch_does() -> None:
    model, pixels = norm_net().train(), images(8, 0)
    clone = copy.deepcopy(model)
    for _ in range(2):
        found = logits_of(model, pixels, 0.0)
        torch.testing.assert_close(found.center, clone(pixels), rtol=1e-4, atol=1e-5)
    assert found.radius.abs().max() < 1e-6
    for (name, value), other in zip(model.state_dict().items(), clone.state_dict().values(),
                                    strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)
    # at any radius the first BatchNorm normalises the same centers
    inside = pixels.clamp(0.2, 0.8)
    before = logits_of(model, inside, 0.0), model[1].running_mean.clone()
    model.load_state_dict(clone.state_dict())
    logits_of(model, inside, 0.1)
    torch.testing.assert_close(model[1].running_mean, before[1])


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    model, pixels = norm_net().train(), images(4, 0).double()
    graph = graph_of(model, THREAT, None, pixels.float())
    model.double()  # the graph holds the model itself
    labels = torch.tensor([0, 1, 2, 0])
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(parameters)

    def loss(*values: Tensor) -> Tensor:
        wrapped = {f"model.{name}": v for name, v in zip(names, values, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(graph.root, wrapped):
            found = propagate(graph, intervals.around(pixels, 0.03, (0.0, 1.0)))
            return F.cross_entropy(worst_case(found, labels), labels)

    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in parameters.values()],
                                    atol=1e-6)


def test_the_slope_through_a_quantizer_is_one_from_end_to_end() -> None:
    q = QuantActivation.from_thresholds([0.5, 1.0, 1.5], step=0.5)
    lower = torch.linspace(-0.5, 2.2, 28).add(1e-3).requires_grad_()
    upper = (lower.detach() + 0.3).requires_grad_()
    found = train_quantized(q, between(lower, upper))
    assert torch.equal(found.lower, q(lower)) and torch.equal(found.upper, q(upper))
    slopes = torch.autograd.grad(found.lower.sum() + 2 * found.upper.sum(), (lower, upper))
    for ends, slope, factor in zip((lower, upper), slopes, (1, 2), strict=True):
        expected = factor * ((ends > 0.25) & (ends < 1.75)).float()
        torch.testing.assert_close(slope, expected)


def test_wide_last_layers_fall_back_to_the_logits_own_intervals(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = random_net([("plain", "relu")], 2).eval(), images(3, 2)
    labels = torch.tensor([0, 1, 2])
    together = worst_case(logits_of(model, pixels), labels)
    monkeypatch.setattr(intervals, "_PAIRS", 0)
    apart = worst_case(logits_of(model, pixels), labels)
    assert (apart >= together - 1e-6).all() and (apart > together + 1e-3).any()
    assert torch.equal(apart.gather(1, labels[:, None]), torch.zeros(3, 1))


class FunctionalNorm(nn.Module):
    """A network that normalises by a function call, with batch statistics if asked to."""

    def __init__(self, training: bool = False) -> None:
        super().__init__()
        self.norm, self.head, self.in_training = nn.BatchNorm2d(2), nn.Linear(50, 3), training
        nn.init.uniform_(self.norm.running_mean)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        mean, var = (None, None) if self.in_training else (norm.running_mean, norm.running_var)
        x = F.batch_norm(x, mean, var, norm.weight, norm.bias, self.in_training, eps=1e-3)
        return self.head(x.flatten(1))


def test_a_functional_batchnorm_is_trained_through_as_its_layer_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, pixels = FunctionalNorm(), images(3, 0)
    model.norm.eps = 1e-3
    layers = nn.Sequential(model.norm, nn.Flatten(), model.head).eval()
    with torch.no_grad():
        holds(model, pixels)
    gradients = []
    for network in (model, layers):
        found = logits_of(network, pixels)
        worst = worst_case(found, torch.arange(3))
        gradients.append(torch.autograd.grad(worst.sum(), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_operations_without_a_rule_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConversionError, match="batch_norm(.|\n)*batch's statistics"):
        logits_of(FunctionalNorm(training=True), images(2, 0))
    reason = "its gradient is unknown"
    monkeypatch.setitem(RULES, F.batch_norm,
                        dataclasses.replace(RULES[F.batch_norm], training=reason))
    with pytest.raises(ConversionError, match=f"batch_norm(.|\n)*{reason}"):
        logits_of(FunctionalNorm(), images(2, 0))
