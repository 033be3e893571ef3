"""The staircase function against a naive float64 loop, finite differences and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from quantguard import blockwise
from quantguard.staircase import MODES, Surrogate, soft_staircase, staircase
from quantguard.windows import windows

SURROGATES = [Surrogate(mode) for mode in MODES]


class Stairs(NamedTuple):
    """Hold the numbers of one staircase: t (m,) or (C, m), step and width () or (C,), zero ()."""

    t: Tensor
    step: Tensor
    width: Tensor
    zero: Tensor


def stairs(bits: int, channels: int | None = None, *, equal: bool = False, zero: float = 0.0,
           seed: int = 0) -> Stairs:
    generator = torch.Generator().manual_seed(seed)
    rows = () if channels is None else (channels,)
    m = 2**bits - 1
    gaps = 0.2 + torch.rand(*rows, m, generator=generator)
    if equal:
        gaps = gaps[..., :1].expand(*rows, m)
    t = gaps.cumsum(-1) - zero * gaps.mean(-1, keepdim=True)
    step = 0.3 + torch.rand(rows, generator=generator)
    return Stairs(t, step, 0.5 + step, torch.tensor(zero))


def inputs(shape: tuple[int, ...], s: Stairs, axis: int | None, seed: int = 1) -> Tensor:
    """Return values over the whole range, every second one exactly a threshold."""
    generator = torch.Generator().manual_seed(seed)
    low, high = float(s.t.min()) - 1, float(s.t.max()) + 1
    x = low + (high - low) * torch.rand(shape, generator=generator)
    m = s.t.shape[-1]
    pick = torch.randint(m, shape, generator=generator)
    if axis is None:
        ties = s.t[pick]
    else:
        rows = pick.movedim(axis, 0)
        ties = s.t.gather(1, rows.flatten(1)).reshape(rows.shape).movedim(0, axis)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, ties, x)


def naive(x: Tensor, s: Stairs, axis: int | None = None) -> Tensor:
    """Return q(x) in float64, one element at a time."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for index in itertools.product(*map(range, x.shape)):
        row = () if axis is None else index[axis]
        value = float(x[index])
        count = sum(value > bound for bound in s.t[row].tolist())
        out[index] = math.nan if value != value else float(s.step[row]) * (count - float(s.zero))
    return out


def away(x: Tensor, edges: Tensor) -> Tensor:
    """Move x out of reach of finite differences at the edges."""
    distance = (x.unsqueeze(-1) - edges).abs().amin(-1)
    return x[distance > 1e-3]


def gradients(function: Callable[..., Tensor], x: Tensor, s: Stairs, upstream: Tensor,
              ) -> tuple[Tensor, Tensor, Tensor]:
    x, t, step = (v.clone().requires_grad_() for v in (x, s.t, s.step))
    function(x, t, step).backward(upstream)
    assert x.grad is not None and t.grad is not None and step.grad is not None
    return x.grad, t.grad, step.grad


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("zero", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_forward_is_the_naive_count_of_thresholds_below(bits: int, equal: bool,
                                                        zero: float) -> None:
    s = stairs(bits, equal=equal, zero=zero)
    x = inputs((4, 5, 6), s, None)
    assert torch.equal(staircase(x, *s), naive(x, s).float())


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("bits", [1, 2, 4, 5, 6, 8])
def test_per_channel_forward_is_the_naive_count(bits: int, axis: int) -> None:
    x_shape = (3, 4, 5)
    s = stairs(bits, x_shape[axis], zero=0.5)
    x = inputs(x_shape, s, axis)
    assert torch.equal(staircase(x, *s, axis=axis), naive(x, s, axis).float())


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bits", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_is_compared_in_float32_and_returned_as_it_came(
        dtype: torch.dtype, bits: int, axis: int | None) -> None:
    s = stairs(bits, None if axis is None else 4)
    # Dyadic thresholds, so that ties exist in every type.
    s = s._replace(t=(s.t * 8).round().cumsum(-1).div(16))
    x = inputs((3, 4, 5), s, axis).to(dtype)
    y = staircase(x, *s, axis=axis)
    assert y.dtype == dtype
    assert torch.equal(y, naive(x.float(), s, axis).float().to(dtype))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "one channel": lambda x: x[:, 1:2],
    "flipped view": lambda x: x.transpose(0, 2),
}


@pytest.mark.parametrize("surrogate", SURROGATES, ids=MODES)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_do_not_depend_on_the_memory_layout(
        layout: str, axis: int | None, surrogate: Surrogate) -> None:
    tensor = torch.randn(3, 4, 3, 6, generator=torch.Generator().manual_seed(3))
    x = LAYOUTS[layout](tensor)
    s = stairs(2, None if axis is None else x.shape[1], zero=1.0)
    upstream = LAYOUTS[layout](tensor.cos())

    def run(x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        return staircase(x, t, step, s.width, s.zero, surrogate, (-1.0, 1.0), axis)

    y = run(x, s.t, s.step)
    assert torch.equal(y, naive(x, s, axis).float())
    if layout not in ("strided", "expanded", "one channel"):  # gapless: the order is kept
        assert y.stride() == x.stride()
    plain = gradients(run, x.contiguous(), s, upstream.contiguous())
    for given in (upstream, upstream.contiguous()):
        for ours, expected in zip(gradients(run, x, s, given), plain, strict=True):
            close(ours, expected)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=MODES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_single_numbers_and_empty_tensors(shape: tuple[int, ...], surrogate: Surrogate) -> None:
    s = stairs(2)
    x = torch.full(shape, float(s.t[1]) + 0.01)
    y = staircase(x, *s, surrogate)
    assert y.shape == shape
    assert torch.equal(y, naive(x, s).float())
    assert soft_staircase(x, *s, 4.0).shape == shape
    grad_x, grad_t, grad_step = gradients(
        lambda x, t, step: staircase(x, t, step, s.width, s.zero, surrogate), x, s,
        torch.ones(shape))
    assert grad_x.shape == shape
    assert float(grad_step) == 2 * x.numel()
    assert torch.isfinite(grad_t).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("bits", [2, 6])
def test_empty_tensors_per_channel(bits: int, axis: int) -> None:
    shape = [0, 0, 0]
    shape[axis] = 4
    s = stairs(bits, 4)
    for surrogate in SURROGATES:
        grads = gradients(lambda x, t, step, how=surrogate: staircase(
            x, t, step, s.width, s.zero, how, axis=axis), torch.empty(shape), s,
            torch.empty(shape))
        assert [g.shape for g in grads] == [torch.Size(shape), s.t.shape, s.step.shape]
        assert not grads[1].any()


@pytest.mark.parametrize("bits", [1, 2, 5, 6, 8])
def test_ties_go_down_infinities_take_the_outer_levels_and_nan_stays(bits: int) -> None:
    s = stairs(bits, zero=1.0)
    m = s.t.numel()
    levels = (torch.arange(m + 1) - 1) * s.step
    assert torch.equal(staircase(s.t, *s), levels[:-1])
    assert torch.equal(staircase(torch.nextafter(s.t, s.t + 1), *s), levels[1:])
    y = staircase(torch.tensor([-math.inf, math.inf, math.nan]), *s)
    assert torch.equal(y[:2], levels[[0, -1]])
    assert y[2].isnan()


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_forward_bits_are_the_same_in_every_mode_with_and_without_gradients(
        bits: int, axis: int | None) -> None:
    s = stairs(bits, None if axis is None else 4, zero=0.5)
    x = inputs((5, 4, 6), s, axis)
    x[0, 0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    reference = naive(x, s, axis).float()
    modes = [*SURROGATES, Surrogate("sigmoid", 2.5)]
    for surrogate, gate in itertools.product(modes, [None, (0.0, 6.0)]):
        for wanted in itertools.product([False, True], repeat=3):
            given = [v.clone().requires_grad_(w)
                     for v, w in zip((x, s.t, s.step), wanted, strict=True)]
            y = staircase(*given, s.width, s.zero, surrogate, gate, axis)
            assert y.requires_grad == any(wanted)
            assert torch.equal(y.detach().nan_to_num(77), reference.nan_to_num(77))


@pytest.mark.parametrize("bits", range(1, 9))
def test_monotone_and_all_levels_are_attained_and_no_others(bits: int) -> None:
    s = stairs(bits, zero=0.5)
    x = torch.linspace(float(s.t[0]) - 2, float(s.t[-1]) + 2, 40_000)
    y = staircase(x, *s)
    assert (y.diff() >= 0).all()
    assert torch.equal(y.unique(), ((torch.arange(2**bits) - 0.5) * s.step).unique())
    assert y.unique().numel() == 2**bits


def test_windows_are_the_means_of_adjacent_gaps_with_end_gaps_repeated() -> None:
    t = torch.tensor([1.0, 2.0, 5.0])
    edges, widths = windows(t, torch.tensor(9.0))
    assert edges.tolist() == [0.5, 1.5, 3.5, 6.5]
    assert widths.tolist() == [1.0, 2.0, 3.0]
    edges, widths = windows(torch.tensor([2.0]), torch.tensor(3.0))
    assert edges.tolist() == [0.5, 3.5] and widths.tolist() == [3.0]
    both = windows(torch.stack([t, 2 * t]), torch.ones(2))
    assert both.edges[1].tolist() == [1.0, 3.0, 7.0, 13.0]


def held_ramp(x: Tensor, lefts: Tensor, widths: Tensor, step: float) -> Tensor:
    """Return ``step * sum_i clip((x - left_i) / w_i, 0, 1)``; the zero level drops out."""
    return step * ((x.unsqueeze(-1) - lefts) / widths).clamp(0, 1).sum(-1)


@pytest.mark.parametrize("zero", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_ramp_gradients_are_the_finite_differences_of_the_held_ramp(bits: int,
                                                                    zero: float) -> None:
    s = stairs(bits, zero=zero)
    edges, widths = (v.double() for v in windows(s.t, s.width))
    x = away(inputs((700,), s, None).double(), edges)
    upstream = torch.linspace(-1, 2, x.numel(), dtype=torch.float64)
    lefts, step, h = edges[:-1], float(s.step), 1e-5
    by_x = (held_ramp(x + h, lefts, widths, step) - held_ramp(x - h, lefts, widths, step)) / (2 * h)
    by_t = []
    for one in h * torch.eye(lefts.numel(), dtype=torch.float64):
        change = held_ramp(x, lefts + one, widths, step) - held_ramp(x, lefts - one, widths, step)
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
    """Return each threshold's share of the slope, (n, m), then what falls outside all windows."""
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
            return soft_staircase(x, t, step, width, s.zero, 4.0, axis)
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
            return soft_staircase(x, t, step, s.width, s.zero, 4.0)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how), (0.0, 2.0))

    complete = gradients(run, x, s, torch.ones(50))
    given = [v.clone().requires_grad_(w) for v, w in zip((x, s.t, s.step), wanted, strict=True)]
    run(*given).sum().backward()
    for tensor, expected, want in zip(given, complete, wanted, strict=True):
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
            return soft_staircase(x, t, step, s.width, s.zero, 4.0)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how))

    half = gradients(run, x, s, torch.ones_like(x))
    full = gradients(run, x.float(), s, torch.ones(x.shape))
    assert [g.dtype for g in half] == [dtype, torch.float32, torch.float32]
    for ours, expected in zip(half, full, strict=True):
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)


def plain_soft(x: Tensor, t: Tensor, step: Tensor, s: Stairs, k: float) -> Tensor:
    """Return the softened twin as its formula reads, with the widths held."""
    widths = windows(t, s.width.to(t.dtype)).widths.detach()
    sigma = torch.sigmoid(k * (x.unsqueeze(-1) - t) / widths)
    return step * (sigma.sum(-1) - s.zero)


@pytest.mark.parametrize("k", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("zero", [0.0, 0.5])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_softened_twin_and_its_gradients_are_autograd_of_the_formula(
        bits: int, zero: float, k: float) -> None:
    s = stairs(bits, zero=zero)
    x = inputs((300,), s, None)
    upstream = torch.linspace(-1, 2, 300)
    wide = Stairs(*(v.double() for v in s))
    expected = gradients(lambda x, t, step: plain_soft(x, t, step, s, k),
                         x.double(), wide, upstream.double())
    y = soft_staircase(x, *s, k)
    torch.testing.assert_close(y.double(), plain_soft(x.double(), wide.t, wide.step, s, k),
                               rtol=1e-4, atol=1e-4)
    ours = gradients(lambda x, t, step: soft_staircase(x, t, step, s.width, s.zero, k), x, s,
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
    ours = gradients(lambda x, t, step: soft_staircase(x, t, step, s.width, s.zero, k), x, s,
                     torch.ones(500))
    value = plain_soft(x.double(), wide.t, wide.step, s, k)
    torch.testing.assert_close(soft_staircase(x, *s, k).double(), value, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-3, atol=5e-3)


def test_softened_twin_holds_its_widths() -> None:
    """The broken twin: without detaching, the widths would add to the thresholds' gradient."""
    s = stairs(2)
    x = inputs((300,), s, None)
    t = s.t.clone().requires_grad_()
    free = windows(t, s.width).widths
    (s.step * torch.sigmoid(4 * (x.unsqueeze(-1) - t) / free).sum()).backward()
    ours = gradients(lambda x, t, step: soft_staircase(x, t, step, s.width, s.zero, 4.0), x, s,
                     torch.ones(300))[1]
    assert t.grad is not None
    assert not torch.allclose(ours, t.grad, rtol=0.05)


def test_softened_twin_tends_to_the_staircase_away_from_the_thresholds() -> None:
    s = stairs(3, zero=1.0)
    x = inputs((500,), s, None)
    x = x[(x.unsqueeze(-1) - s.t).abs().amin(-1) > 0.02]
    errors = [float((soft_staircase(x, *s, k) - staircase(x, *s)).abs().max())
              for k in (2.0, 16.0, 128.0, 1024.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[-1] < 1e-6


def test_softened_twin_keeps_nan_and_saturates() -> None:
    s = stairs(2)
    y = soft_staircase(torch.tensor([-math.inf, math.inf, math.nan]), *s, 4.0)
    assert float(y[0]) == 0 and float(y[1]) == pytest.approx(3 * float(s.step))
    assert y[2].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, -4])
@pytest.mark.parametrize("how", ["ramp", "sigmoid", "parent", "soft"])
def test_tensors_larger_than_a_block_agree_with_one_block(
        how: str, axis: int | None, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = LAYOUTS[layout](torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(2)))
    s = stairs(2, None if axis is None else x.shape[axis], zero=1.0)
    upstream = x.cos()

    def run(x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        if how == "soft":
            return soft_staircase(x, t, step, s.width, s.zero, 4.0, axis)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how), (-1.0, 1.0), axis)

    def everything() -> list[Tensor]:
        with torch.no_grad():
            y = run(x, s.t, s.step)
        return [y, *gradients(run, x, s, upstream)]

    whole = everything()
    monkeypatch.setattr(blockwise, "BLOCK", 7)
    for ours, expected in zip(everything(), whole, strict=True):
        close(ours, expected)


def test_the_caller_may_write_into_input_and_result_before_backward() -> None:
    """Float GELU, SiLU or Hardswish allow it, and torchvision's in-place Dropout does it."""
    s = stairs(2)
    x = inputs((50,), s, None)
    for how in (*MODES, "soft"):

        def run(x: Tensor, t: Tensor, step: Tensor, overwrite: bool, how: str = how) -> Tensor:
            x = x * 1
            y = soft_staircase(x, t, step, s.width, s.zero, 4.0) if how == "soft" else \
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


def test_inputs_and_thresholds_are_not_written_to() -> None:
    s = stairs(2)
    x = inputs((50,), s, None)
    before = [v.clone() for v in (x, *s)]
    for surrogate in SURROGATES:
        gradients(lambda x, t, step, how=surrogate: staircase(x, t, step, s.width, s.zero, how),
                  x, s, torch.ones(50))
    soft_staircase(x, *s, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *s), strict=True))


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("spread", ["equal", "learned", "tanh", "crowded"])
def test_many_thresholds_are_looked_up_to_the_bit(bits: int, spread: str) -> None:
    generator, m = torch.Generator().manual_seed(bits), 2**bits - 1
    gaps = torch.ones(m) if spread == "equal" else 0.1 + torch.rand(m, generator=generator)
    t = gaps.cumsum(0) - 20
    if spread == "tanh":
        t = torch.atanh(torch.linspace(-0.999, 0.999, m))
    if spread == "crowded":  # half of them in a thousandth of the range: no grid helps
        t[: m // 2] = t[0] + torch.arange(m // 2) * 1e-4
    cells = blockwise.Cells.of(t)
    assert (cells is None) == (spread == "crowded")
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38])
    x = torch.cat([t, t.nextafter(t + 1), t.nextafter(t - 1), special,
                   t[0] - 5 + (t[-1] - t[0] + 10) * torch.rand(500, generator=generator)])
    if cells is not None:
        found = cells.below(x)
        assert torch.equal(found[~x.isnan()], torch.searchsorted(t, x)[~x.isnan()].float())
        wrong = cells._replace(before=(cells.before - 1).clamp(min=0), most=0)  # a broken twin
        assert not torch.equal(wrong.below(x)[~x.isnan()], found[~x.isnan()])
    x.requires_grad_()
    step, zero = torch.tensor(0.5), torch.tensor(0.0)
    y = staircase(x, t, step, step, zero)
    y.sum().backward()
    expected = (x.detach().unsqueeze(1) > t).sum(1) * 0.5
    torch.testing.assert_close(y.detach(), torch.where(x.isnan(), x, expected).detach(), rtol=0,
                               atol=0, equal_nan=True)
    edges, widths = windows(t, step)
    inside = torch.cat([torch.zeros(1), step / widths, torch.zeros(1)])
    slope = inside[(x.detach().unsqueeze(1) > edges).sum(1)]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, slope, rtol=0, atol=0)
