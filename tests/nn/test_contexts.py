"""Contexts: float, surrogate gradients, soft quantization, other bits, listeners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_quantizers import T3, X, after, behaviour, model, same, switches, three
from torch import nn

from quantguard.core.errors import SpecError
from quantguard.nn.contexts import at_bits, backward, bypass, listening, observing, soften
from quantguard.nn.functional.staircase import Surrogate, soft_quantizer, staircase
from quantguard.nn.quant_activation import QuantActivation


def test_bypass_is_the_float_function() -> None:
    net = model()
    with bypass(net) as inside:
        assert inside is net
        assert torch.equal(net(X), nn.GELU()(nn.ReLU()(X)))


@pytest.mark.parametrize(("mode", "surrogate"), [
    ("ramp", Surrogate()), ("ste", Surrogate("ste")), ("parent", Surrogate("parent")),
    ("sigmoid", Surrogate("sigmoid", 8.0)), ("sigmoid(3)", Surrogate("sigmoid", 3.0)),
    ("sigmoid(2.5)", Surrogate("sigmoid", 2.5))])
def test_backward_chooses_the_gradient_and_only_that(mode: str, surrogate: Surrogate) -> None:
    module = after(nn.ReLU())
    step, x = torch.tensor(0.75), X.clone().requires_grad_()
    y = staircase(x, torch.tensor(T3), step, step, step * 0, surrogate, (0.0, math.inf))
    y.sum().backward()
    assert x.grad is not None
    with backward(module, mode):
        assert same(behaviour(module), (y.detach(), x.grad))


def test_soften_is_the_softened_staircase_at_its_sharpness() -> None:
    module, step = after(nn.SiLU()), torch.tensor(0.75)
    for k in (2, 8.0):
        with soften(module, k):
            expected = soft_quantizer(nn.SiLU()(X), torch.tensor(T3), step, step, step * 0, k)
            assert torch.equal(module(X), expected)


@pytest.mark.parametrize("name", switches())
def test_a_context_changes_the_model_and_ends_after_an_exception(name: str) -> None:
    net = model()
    before = behaviour(net)
    with switches()[name](net):
        assert not same(behaviour(net), before)
    assert same(behaviour(net), before)
    with pytest.raises(ZeroDivisionError), switches()[name](net):
        1 / 0  # noqa: B018
    assert same(behaviour(net), before)


@pytest.mark.parametrize("inner", switches())
@pytest.mark.parametrize("outer", switches())
def test_contexts_nest(outer: str, inner: str) -> None:
    net = model()
    first = behaviour(net)
    with switches()[outer](net):
        before = behaviour(net)
        with pytest.raises(ZeroDivisionError), switches()[inner](net):
            1 / 0  # noqa: B018
        assert same(behaviour(net), before)
        with switches()[inner](net[1]):  # a part of the model
            pass
        assert same(behaviour(net), before)
    assert same(behaviour(net), first)


def test_a_surrogate_chosen_outside_holds_inside_other_contexts() -> None:
    module = after(nn.ReLU())
    with backward(module, "ste"):
        ste = behaviour(module)
        with bypass(module), backward(module, "sigmoid"):
            assert torch.equal(behaviour(module)[0], nn.ReLU()(X))
        assert same(behaviour(module), ste)


@pytest.mark.parametrize("mode", ["", "ramps", "RAMP", "ste(3)", "sigmoid()", "sigmoid(-1)",
                                  "sigmoid(k)", "sigmoid(1.2.3)", "sigmoid(.)", "sigmoid(0)"])
def test_unknown_surrogates_are_refused(mode: str) -> None:
    net = model()
    before = behaviour(net)
    with pytest.raises(SpecError, match="unknown|positive"), backward(net, mode):
        pass
    assert same(behaviour(net), before)


@pytest.mark.parametrize("k", [0, -1.0, math.nan, math.inf, "4", None])
def test_impossible_sharpness_is_refused(k: Any) -> None:
    net = model()
    with pytest.raises(SpecError, match="must be a positive number"), soften(net, k):
        pass


def test_contexts_leave_a_model_without_quantizers_alone() -> None:
    net = nn.Linear(2, 2)
    with bypass(net), backward(net, "ste"), soften(net, 3):
        assert net(torch.zeros(1, 2)).shape == (1, 2)


def test_listeners_get_quantized_and_observed_inputs_inside_the_context_only() -> None:
    net, received = model(), []
    with listening(net, {"1.0": received.append}):
        net(X)
    with observing(net, {"1.0": received.append}):
        net(X)
    net(X)
    assert len(received) == 2
    assert torch.equal(received[0], nn.GELU()(net[0](X)))
    assert torch.equal(received[1], nn.GELU()(nn.ReLU()(X)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", [0.0, 1.5])
def test_other_bits_over_the_same_range(bits: int, zero: float) -> None:
    module = QuantActivation.from_thresholds(torch.tensor([0.5, 1.5, 2.5]) - zero, 1.0, zero)
    x = torch.linspace(-4, 5, 4001)
    plain = module(x)
    with at_bits(module, bits):
        y = module(x)
        assert len(y.unique()) == 2**bits
        assert y.min() == plain.min() and torch.isclose(y.max(), plain.max())
        with soften(module, 200.0):
            assert (module(x) - y).abs().mean() < 0.02
    if bits == 2:
        assert torch.equal(y, plain)
    if bits == 8:  # nearly the line through its levels
        line = x.clamp(plain.min(), plain.max())
        assert (y - line).abs().max() < 0.01
    assert torch.equal(module(x), plain)
    with at_bits(module, 32):
        assert torch.equal(module(x), x)


def test_other_bits_of_learned_thresholds_interpolate_them() -> None:
    module = QuantActivation.from_thresholds([[0.0, 1.0, 4.0], [1.0, 2.0, 3.0]], 1.0, dynamic=True)
    x = torch.tensor([[0.1, 0.6, 3.9, 9.0], [0.9, 1.6, 2.1, 9.0]])
    with at_bits(module, 8):
        # The middle between two thresholds has their level, and a threshold is half-way to it.
        y = module(torch.stack([x, x]))
    assert y.shape == (2, 2, 4) and (y[0] - torch.tensor(
        [[0.6, 1.1, 2.47, 3.0], [0.4, 1.1, 1.6, 3.0]])).abs().max() < 0.02


def test_other_bits_of_one_threshold_use_its_window() -> None:
    module = QuantActivation.from_thresholds([1.0], 2.0, width=2.0)
    with at_bits(module, 8):
        assert (module(torch.tensor([0.0, 0.5, 1.0, 2.0])) -
                torch.tensor([0.0, 0.5, 1.0, 2.0])).abs().max() < 0.01


def test_impossible_bits_are_refused() -> None:
    with pytest.raises(SpecError, match="bits=9"), at_bits(three(), 9):
        pass
