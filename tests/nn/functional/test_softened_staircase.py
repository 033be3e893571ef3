"""The softened staircase and its gradients against autograd of the formula."""

from __future__ import annotations

import math

import pytest
import torch
from staircase_numbers import Stairs, gradients, inputs, stairs
from torch import Tensor

from quantguard.nn.functional.staircase import soft_quantizer, staircase
from quantguard.nn.functional.surrogates import windows


def plain_soft(x: Tensor, t: Tensor, step: Tensor, s: Stairs, k: float) -> Tensor:
    """Return the softened staircase by its formula, with constant widths."""
    widths = windows(t, s.width.to(t.dtype)).widths.detach()
    sigma = torch.sigmoid(k * (x.unsqueeze(-1) - t) / widths)
    return step * (sigma.sum(-1) - s.zero)


@pytest.mark.parametrize("k", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("zero", [0.0, 0.5])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_softened_staircase_and_its_gradients_are_autograd_of_the_formula(
        bits: int, zero: float, k: float) -> None:
    s = stairs(bits, zero=zero)
    x = inputs((300,), s, None)
    upstream = torch.linspace(-1, 2, 300)
    wide = Stairs(*(v.double() for v in s))
    expected = gradients(lambda x, t, step: plain_soft(x, t, step, s, k),
                         x.double(), wide, upstream.double())
    y = soft_quantizer(x, *s, k)
    torch.testing.assert_close(y.double(), plain_soft(x.double(), wide.t, wide.step, s, k),
                               rtol=1e-4, atol=1e-4)
    ours = gradients(lambda x, t, step: soft_quantizer(x, t, step, s.width, s.zero, k), x, s,
                     upstream)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("k", [2.0, 8.0])
@pytest.mark.parametrize("bits", [3, 5, 6, 8])
def test_every_threshold_counts_where_gaps_are_very_unequal(bits: int, k: float) -> None:
    """A wide window's sigmoid reaches over many narrow neighbours."""
    s = stairs(bits)
    gaps = torch.randn(2**bits - 1, generator=torch.Generator().manual_seed(4)).exp()
    s = s._replace(t=gaps.cumsum(0) / 10)
    x, wide = inputs((500,), s, None), Stairs(*(v.double() for v in s))
    expected = gradients(lambda x, t, step: plain_soft(x, t, step, s, k), x.double(), wide,
                         torch.ones(500, dtype=torch.float64))
    ours = gradients(lambda x, t, step: soft_quantizer(x, t, step, s.width, s.zero, k), x, s,
                     torch.ones(500))
    value = plain_soft(x.double(), wide.t, wide.step, s, k)
    torch.testing.assert_close(soft_quantizer(x, *s, k).double(), value, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=5e-3)


def test_widths_of_the_softened_staircase_have_no_gradient() -> None:
    """Without detaching, the widths would add to the thresholds' gradient."""
    s = stairs(2)
    x = inputs((300,), s, None)
    t = s.t.clone().requires_grad_()
    free = windows(t, s.width).widths
    (s.step * torch.sigmoid(4 * (x.unsqueeze(-1) - t) / free).sum()).backward()
    ours = gradients(lambda x, t, step: soft_quantizer(x, t, step, s.width, s.zero, 4.0), x, s,
                     torch.ones(300))[1]
    assert t.grad is not None
    assert not torch.allclose(ours, t.grad, rtol=0.05)


def test_softened_staircase_tends_to_the_staircase_away_from_thresholds() -> None:
    s = stairs(3, zero=1.0)
    x = inputs((500,), s, None)
    x = x[(x.unsqueeze(-1) - s.t).abs().amin(-1) > 0.02]
    errors = [float((soft_quantizer(x, *s, k) - staircase(x, *s)).abs().max())
              for k in (2.0, 16.0, 128.0, 1024.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[-1] < 1e-6


def test_softened_staircase_saturates_and_nan_stays_nan() -> None:
    s = stairs(2)
    y = soft_quantizer(torch.tensor([-math.inf, math.inf, math.nan]), *s, 4.0)
    assert float(y[0]) == 0 and float(y[1]) == pytest.approx(3 * float(s.step))
    assert y[2].isnan()
