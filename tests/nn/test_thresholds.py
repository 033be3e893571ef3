"""Thresholds of a quantizer: explicit numbers, learned parameters, the window at one bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_quantizers import T3, three
from torch import Tensor, nn

from quantguard.core.errors import SpecError
from quantguard.core.specs import QuantSpec
from quantguard.nn.functional.staircase import staircase
from quantguard.nn.quant_activation import GAP_FLOOR, QuantActivation


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels", [None, 1, 4])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_from_thresholds_returns_its_numbers(bits: int, channels: int | None,
                                                dynamic: bool) -> None:
    rows = () if channels is None else (channels,)
    m = 2**bits - 1
    t = (0.1 + torch.rand(*rows, m, generator=torch.Generator().manual_seed(bits))).cumsum(-1)
    step = torch.full(rows, 0.3) + torch.arange(channels or 1).reshape(rows)
    module = QuantActivation.from_thresholds(t, step, zero=0.5, width=0.7, dynamic=dynamic)
    assert module.spec == QuantSpec(bits, dynamic, channels is not None)
    torch.testing.assert_close(module.thresholds, t, rtol=1e-6, atol=0)
    assert torch.equal(module.step, step)
    assert module.zero == 0.5
    x = torch.randn(2, channels or 3, 5)
    expected = staircase(x, module.thresholds, step, torch.full(rows, 0.7), torch.tensor(0.5),
                         axis=None if channels is None else 1)
    assert torch.equal(module(x), expected)
    assert len(list(module.parameters())) == (3 if dynamic else 0)


@pytest.mark.parametrize("step", [2.0, torch.tensor(2.0), torch.tensor([2.0])])
@pytest.mark.parametrize("t", [T3, torch.tensor(T3), torch.tensor([T3, T3])])
def test_one_step_may_be_a_number_a_scalar_or_a_single_element(
        step: float | Tensor, t: list[float] | Tensor) -> None:
    module = QuantActivation.from_thresholds(t, step)
    assert module.step.shape == module.thresholds.shape[:-1]
    assert (module.step == 2).all()
    assert module(torch.ones(1, 2, 1)).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("arguments", "message"), [
    (([0.1, 0.2], 1.0), r"shape \(2,\)"),
    (([], 1.0), r"shape \(0,\)"),
    ((torch.arange(511.0), 1.0), r"shape \(511,\)"),
    ((torch.zeros(1, 1, 1), 1.0), r"shape \(1, 1, 1\)"),
    ((torch.tensor(1.0), 1.0), r"shape \(\)"),
    (([1.0, 1.0, 2.0], 1.0), "strictly ascending"),
    (([3.0, 2.0, 1.0], 1.0), "strictly ascending"),
    (([1.0, 2.0, math.inf], 1.0), "finite"),
    (([1.0, math.nan, 3.0], 1.0), "finite"),
    ((T3, 0.0), "step must be positive"),
    ((T3, -1.0), "step must be positive"),
    ((T3, math.nan), "step must be positive"),
    ((T3, math.inf), "step must be positive"),
    ((T3, torch.ones(2)), r"step has shape \(2,\)"),
    ((torch.tensor([T3, T3]), torch.ones(3)), r"step has shape \(3,\), expected one number or"),
    ((T3, 1.0, 0.3), "zero=0.3 must be a multiple of 1/2"),
    ((T3, 1.0, math.nan), "zero=nan"),
    ((T3, 1.0, 0, -1.0), "width must be positive"),
    ((T3, 1.0, 0, torch.ones(4)), r"width has shape \(4,\)"),
])
def test_impossible_numbers_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        QuantActivation.from_thresholds(*arguments)


def test_placing_thresholds_that_do_not_fit_the_spec_is_refused_and_changes_nothing() -> None:
    module = three()
    for t in ([0.5], torch.tensor([T3])):
        with pytest.raises(SpecError, match=r"but QuantSpec\(bits=2"):
            module.set_thresholds(t, 1.0)
    with pytest.raises(SpecError, match="not 32"):
        QuantActivation(QuantSpec(32))
    assert module.thresholds.tolist() == T3


numbers = st.floats(-6, 6, width=32)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 4), shift=numbers, log_step=numbers,
       log_gaps=st.lists(numbers, min_size=14, max_size=14), seed=st.integers(0, 99))
def test_learned_thresholds_ascend_for_any_parameters(
        bits: int, shift: float, log_step: float, log_gaps: list[float], seed: int) -> None:
    m = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    t = (0.05 + torch.rand(m, generator=generator)).cumsum(0)
    module = QuantActivation.from_thresholds(t, 0.5, dynamic=True)
    with torch.no_grad():
        module.shift.fill_(shift)
        module.log_step.fill_(log_step)
        module.log_gaps.copy_(torch.tensor(log_gaps[:m - 1]))
    moved = module.thresholds.detach()
    share = torch.tensor(log_gaps[:m - 1]).exp()
    assert float(moved[0]) == pytest.approx(float(t[0]) + 0.5 * shift, abs=1e-4)
    torch.testing.assert_close(moved.diff(), t.diff() * (GAP_FLOOR + (1 - GAP_FLOOR) * share),
                               rtol=2e-3, atol=2e-3)
    assert (moved.diff() > 0).all()
    assert float(module.step.detach()) == pytest.approx(0.5 * math.exp(log_step), rel=1e-4)


def test_gaps_have_a_floor_for_any_parameter() -> None:
    module = three(dynamic=True)
    with torch.no_grad():
        module.log_gaps.fill_(-1e4)
    floor = torch.tensor(T3).diff() * GAP_FLOOR
    torch.testing.assert_close(module.thresholds.diff(), floor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [None, 3])
def test_learned_parameters_get_the_gradient_of_the_thresholds(channels: int | None) -> None:
    t = torch.tensor(T3) if channels is None else torch.tensor(T3).repeat(channels, 1)
    module = QuantActivation.from_thresholds(t, 0.75, dynamic=True)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)) + 1
    module(x).sum().backward()
    leaf = t.clone().requires_grad_()
    step = module.step.detach().clone().requires_grad_()
    staircase(x, leaf, step, torch.ones(t.shape[:-1]), torch.tensor(0.0),
              axis=None if channels is None else 1).sum().backward()
    assert leaf.grad is not None and step.grad is not None
    assert leaf.grad.abs().sum() > 0
    gaps = t.diff() * (1 - GAP_FLOOR)
    later = leaf.grad.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    torch.testing.assert_close(module.shift.grad, 0.75 * leaf.grad.sum(-1))
    torch.testing.assert_close(module.log_gaps.grad, gaps * later)
    torch.testing.assert_close(module.log_step.grad, 0.75 * step.grad)


@pytest.mark.parametrize(("t", "zero", "width", "dynamic", "shift", "expected"), [
    (0.5, 0, None, False, 0.0, 1.0),   # 2 t_1
    (0.5, 0, 3.0, False, 0.0, 3.0),    # as passed
    (-0.5, 0, None, False, 0.0, 0.75),  # t_1 below 0: the step
    (0.5, 0.5, None, False, 0.0, 0.75),  # signed: the step
    (0.5, 0, None, True, 1.0, 2.5),    # learned: 2 t_1 moves with t_1 = 0.5 + 0.75
    (0.5, 0, None, True, -0.6, 1.0),   # t_1 = 0.05, not well above 0: the calibrated constant
    (0.5, 0.5, None, True, 1.0, 0.75),
])
def test_window_at_one_bit(t: float, zero: float, width: float | None, dynamic: bool, shift: float,
                           expected: float) -> None:
    module = QuantActivation.from_thresholds([t], 0.75, zero, width, dynamic)
    if dynamic:
        nn.init.constant_(module.shift, shift)
    x = torch.linspace(-4, 4, 4001, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    inside = x.detach()[x.grad > 0]
    first = float(module.thresholds.detach())
    assert float(inside.max() - inside.min()) == pytest.approx(expected, abs=0.01)
    assert float(inside.max() + inside.min()) / 2 == pytest.approx(first, abs=0.01)
    assert float(x.grad.max()) == pytest.approx(0.75 / expected, rel=1e-4)
