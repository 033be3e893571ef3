"""Surrogate gradients of the staircase against finite differences and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from staircase_numbers import Stairs, away, close, gradients, inputs, stairs
from torch import Tensor

from quantguard.nn.functional.staircase import MODES, Surrogate, soft_quantizer, staircase
from quantguard.nn.functional.surrogates import windows


def test_windows_are_the_means_of_adjacent_gaps_with_end_gaps_repeated() -> None:
    t = torch.tensor([1.0, 2.0, 5.0])
    edges, widths = windows(t, torch.tensor(9.0))
    assert edges.tolist() == [0.5, 1.5, 3.5, 6.5]
    assert widths.tolist() == [1.0, 2.0, 3.0]
    edges, widths = windows(torch.tensor([2.0]), torch.tensor(3.0))
    assert edges.tolist() == [0.5, 3.5] and widths.tolist() == [3.0]
    both = windows(torch.stack([t, 2 * t]), torch.ones(2))
    assert both.edges[1].tolist() == [1.0, 3.0, 7.0, 13.0]


def fixed_ramp(x: Tensor, lefts: Tensor, widths: Tensor, step: float) -> Tensor:
    """Return ``step * sum_i clip((x - left_i) / w_i, 0, 1)``, without the zero level."""
    return step * ((x.unsqueeze(-1) - lefts) / widths).clamp(0, 1).sum(-1)


@pytest.mark.parametrize("zero", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_ramp_gradients_are_the_finite_differences_of_the_fixed_ramp(bits: int,
                                                                    zero: float) -> None:
    s = stairs(bits, zero=zero)
    edges, widths = (v.double() for v in windows(s.t, s.width))
    x = away(inputs((700,), s, None).double(), edges)
    upstream = torch.linspace(-1, 2, x.numel(), dtype=torch.float64)
    lefts, step, h = edges[:-1], float(s.step), 1e-5
    by_x = (fixed_ramp(x + h, lefts, widths, step)
            - fixed_ramp(x - h, lefts, widths, step)) / (2 * h)
    by_t = []
    for one in h * torch.eye(lefts.numel(), dtype=torch.float64):
        change = fixed_ramp(x, lefts + one, widths, step) - fixed_ramp(x, lefts - one, widths, step)
        by_t.append((upstream * change).sum() / (2 * h))
    count = (x.unsqueeze(-1) > s.t).sum(-1)
    grad_x, grad_t, grad_step = gradients(
        lambda x, t, step: staircase(x, t, step, s.width, s.zero), x.float(), s, upstream.float())
    close(grad_x, upstream * by_x)
    torch.testing.assert_close(grad_t.double(), torch.stack(by_t), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad_step.double(), (upstream * (count - zero)).sum(),
                               rtol=1e-5, atol=1e-4)


def closed_form(mode: str, k: float, gate: tuple[float, float] | None, x: Tensor, s: Stairs,
                ) -> Tensor:
    """Return each threshold's share of the slope, (n, m), then that outside all windows."""
    edges, widths = (v.double() for v in windows(s.t, s.width))
    step, m = s.step.double(), s.t.numel()
    inside = (x.unsqueeze(-1) > edges[:-1]) & (x.unsqueeze(-1) <= edges[1:])
    total = m * step / (edges[-1] - edges[0])
    if mode == "ramp":
        shares = inside * (step / widths)
    elif mode == "sigmoid":
        sigma = 1 / (1 + torch.exp(-k * (x.unsqueeze(-1) - s.t.double()) / widths))
        shares = step * k / widths * sigma * (1 - sigma)
    else:
        shares = inside * total
    outside = torch.zeros_like(x)
    if mode == "parent":
        outside = total * ~inside.any(-1)
        if gate is not None:
            open_ = (x > gate[0]) & (x < gate[1])
            shares, outside = shares * open_.unsqueeze(-1), outside * open_
    return torch.cat([shares, outside.unsqueeze(-1)], -1)


CLOSED: list[tuple[str, float, tuple[float, float] | None]] = [
    ("ramp", 8.0, None), ("ste", 8.0, None), ("sigmoid", 8.0, None), ("sigmoid", 2.0, None),
    ("parent", 8.0, None), ("parent", 8.0, (0.0, math.inf)), ("parent", 8.0, (0.0, 1.2))]


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("mode", "k", "gate"), CLOSED)
def test_slopes_are_their_closed_forms(mode: str, k: float, gate: tuple[float, float] | None,
                                       bits: int) -> None:
    s = stairs(bits, zero=1.0)
    x = away(inputs((600,), s, None), windows(s.t, s.width).edges)
    upstream = torch.linspace(-1, 2, x.numel())
    shares = closed_form(mode, k, gate, x.double(), s)
    grad_x, grad_t, grad_step = gradients(
        lambda x, t, step: staircase(x, t, step, s.width, s.zero, Surrogate(mode, k), gate),
        x, s, upstream)
    close(grad_x, upstream * shares.sum(-1))
    expected = -(upstream.double().unsqueeze(-1) * shares[:, :-1]).sum(0)
    torch.testing.assert_close(grad_t.double(), expected, rtol=1e-4, atol=1e-3)
    assert float(grad_t.abs().sum()) > 0
    levels = (x.unsqueeze(-1) > s.t).sum(-1) - 1.0
    torch.testing.assert_close(grad_step, (upstream * levels).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("how", ["ramp", "ste", "sigmoid", "parent", "soft"])
def test_per_channel_is_each_channel_by_itself(how: str, axis: int) -> None:
    shape = (4, 5, 6)
    s = stairs(2, shape[axis], zero=0.5)
    x = inputs(shape, s, axis)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(5))

    def run(x: Tensor, t: Tensor, step: Tensor, width: Tensor, axis: int | None) -> Tensor:
        if how == "soft":
            return soft_quantizer(x, t, step, width, s.zero, 4.0, axis)
        return staircase(x, t, step, width, s.zero, Surrogate(how), (-0.5, 2.0), axis)

    ours = gradients(lambda x, t, step: run(x, t, step, s.width, axis), x, s, upstream)
    for row in range(shape[axis]):
        one = Stairs(s.t[row], s.step[row], s.width[row], s.zero)
        alone = gradients(lambda x, t, step, width=one.width: run(x, t, step, width, None),
                          x.select(axis, row), one, upstream.select(axis, row))
        close(ours[0].select(axis, row), alone[0])
        close(ours[1][row], alone[1])
        close(ours[2][row], alone[2])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("how", ["ramp", "ste", "sigmoid", "parent", "soft"])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
        how: str, wanted: tuple[bool, bool, bool]) -> None:
    s = stairs(3)
    x = inputs((50,), s, None)

    def run(x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        if how == "soft":
            return soft_quantizer(x, t, step, s.width, s.zero, 4.0)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how), (0.0, 2.0))

    complete = gradients(run, x, s, torch.ones(50))
    leaves = [v.clone().requires_grad_(w) for v, w in zip((x, s.t, s.step), wanted, strict=True)]
    run(*leaves).sum().backward()
    for tensor, expected, want in zip(leaves, complete, wanted, strict=True):
        if want:
            assert tensor.grad is not None
            close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["ramp", "ste", "sigmoid", "parent", "soft"])
def test_half_precision_gradients_follow_float32(how: str, dtype: torch.dtype) -> None:
    s = stairs(2)
    x = inputs((400,), s, None).to(dtype)

    def run(x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        if how == "soft":
            return soft_quantizer(x, t, step, s.width, s.zero, 4.0)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how))

    half = gradients(run, x, s, torch.ones_like(x))
    full = gradients(run, x.float(), s, torch.ones(x.shape))
    assert [g.dtype for g in half] == [dtype, torch.float32, torch.float32]
    for ours, expected in zip(half, full, strict=True):
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_caller_may_write_into_input_and_result_before_backward() -> None:
    """Float GELU, SiLU and Hardswish allow it, and torchvision's in-place Dropout does it."""
    s = stairs(2)
    x = inputs((50,), s, None)
    for how in (*MODES, "soft"):

        def run(x: Tensor, t: Tensor, step: Tensor, overwrite: bool, how: str = how) -> Tensor:
            x = x * 1
            y = soft_quantizer(x, t, step, s.width, s.zero, 4.0) if how == "soft" else \
                staircase(x, t, step, s.width, s.zero, Surrogate(how))
            if overwrite:
                x.zero_()
                y.mul_(2)
                return y
            return y * 2

        clean = gradients(lambda *a: run(*a, overwrite=False), x, s, torch.ones(50))
        for ours, expected in zip(gradients(lambda *a: run(*a, overwrite=True), x, s,
                                            torch.ones(50)), clean, strict=True):
            close(ours, expected)
