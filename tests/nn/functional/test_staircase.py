"""The staircase function against a naive float64 loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from staircase_numbers import LAYOUTS, SURROGATES, close, gradients, inputs, naive, stairs
from torch import Tensor

from quantguard.nn.functional import memory_blocks
from quantguard.nn.functional.level_search import Cells
from quantguard.nn.functional.staircase import MODES, Surrogate, soft_quantizer, staircase
from quantguard.nn.functional.surrogates import windows


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
def test_every_type_is_compared_in_float32_and_returned_in_its_own_type(
        dtype: torch.dtype, bits: int, axis: int | None) -> None:
    s = stairs(bits, None if axis is None else 4)
    # Dyadic thresholds, so that ties exist in every type.
    s = s._replace(t=(s.t * 8).round().cumsum(-1).div(16))
    x = inputs((3, 4, 5), s, axis).to(dtype)
    y = staircase(x, *s, axis=axis)
    assert y.dtype == dtype
    assert torch.equal(y, naive(x.float(), s, axis).float().to(dtype))


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
    if layout not in ("strided", "expanded", "one channel"):  # gapless: the order stays
        assert y.stride() == x.stride()
    plain = gradients(run, x.contiguous(), s, upstream.contiguous())
    for grad in (upstream, upstream.contiguous()):
        for ours, expected in zip(gradients(run, x, s, grad), plain, strict=True):
            close(ours, expected)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=MODES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_single_numbers_and_empty_tensors(shape: tuple[int, ...], surrogate: Surrogate) -> None:
    s = stairs(2)
    x = torch.full(shape, float(s.t[1]) + 0.01)
    y = staircase(x, *s, surrogate)
    assert y.shape == shape
    assert torch.equal(y, naive(x, s).float())
    assert soft_quantizer(x, *s, 4.0).shape == shape
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
def test_ties_go_down_infinities_get_the_outer_levels_and_nan_stays(bits: int) -> None:
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
            leaves = [v.clone().requires_grad_(w)
                     for v, w in zip((x, s.t, s.step), wanted, strict=True)]
            y = staircase(*leaves, s.width, s.zero, surrogate, gate, axis)
            assert y.requires_grad == any(wanted)
            assert torch.equal(y.detach().nan_to_num(77), reference.nan_to_num(77))


@pytest.mark.parametrize("bits", range(1, 9))
def test_it_is_monotone_and_attains_exactly_its_levels(bits: int) -> None:
    s = stairs(bits, zero=0.5)
    x = torch.linspace(float(s.t[0]) - 2, float(s.t[-1]) + 2, 40_000)
    y = staircase(x, *s)
    assert (y.diff() >= 0).all()
    assert torch.equal(y.unique(), ((torch.arange(2**bits) - 0.5) * s.step).unique())
    assert y.unique().numel() == 2**bits


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
            return soft_quantizer(x, t, step, s.width, s.zero, 4.0, axis)
        return staircase(x, t, step, s.width, s.zero, Surrogate(how), (-1.0, 1.0), axis)

    def everything() -> list[Tensor]:
        with torch.no_grad():
            y = run(x, s.t, s.step)
        return [y, *gradients(run, x, s, upstream)]

    whole = everything()
    monkeypatch.setattr(memory_blocks, "BLOCK", 7)
    for ours, expected in zip(everything(), whole, strict=True):
        close(ours, expected)


def test_inputs_and_thresholds_are_not_written_to() -> None:
    s = stairs(2)
    x = inputs((50,), s, None)
    before = [v.clone() for v in (x, *s)]
    for surrogate in SURROGATES:
        gradients(lambda x, t, step, how=surrogate: staircase(x, t, step, s.width, s.zero, how),
                  x, s, torch.ones(50))
    soft_quantizer(x, *s, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *s), strict=True))


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("spread", ["equal", "learned", "tanh", "crowded"])
def test_many_thresholds_are_looked_up_to_the_bit(bits: int, spread: str) -> None:
    generator, m = torch.Generator().manual_seed(bits), 2**bits - 1
    gaps = torch.ones(m) if spread == "equal" else 0.1 + torch.rand(m, generator=generator)
    t = gaps.cumsum(0) - 20
    if spread == "tanh":
        t = torch.atanh(torch.linspace(-0.999, 0.999, m))
    if spread == "crowded":  # half of them in a thousandth of the range: a grid does not help
        t[: m // 2] = t[0] + torch.arange(m // 2) * 1e-4
    cells = Cells.of(t)
    assert (cells is None) == (spread == "crowded")
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38])
    x = torch.cat([t, t.nextafter(t + 1), t.nextafter(t - 1), special,
                   t[0] - 5 + (t[-1] - t[0] + 10) * torch.rand(500, generator=generator)])
    if cells is not None:
        found = cells.below(x)
        assert torch.equal(found[~x.isnan()], torch.searchsorted(t, x)[~x.isnan()].float())
        wrong = cells._replace(before=(cells.before - 1).clamp(min=0), most=0)  # a wrong grid
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
