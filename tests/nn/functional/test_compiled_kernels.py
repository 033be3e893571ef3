"""Compiled kernels: the same bits as eager kernels, which run where nothing compiles."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantguard.core.specs import QuantSpec
from quantguard.nn.contexts import backward
from quantguard.nn.functional import compiled_kernels as fused
from quantguard.nn.functional.staircase import Surrogate, soft_quantizer, staircase
from quantguard.nn.functional.surrogates import slope_tables, windows
from quantguard.nn.quant_activation import QuantActivation

SHAPE = (4, 6, 9, 5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Compile for tensors of any size; return the passes that were called, and whether they ran."""
    seen: list[tuple[str, bool]] = []
    run = fused._run

    def noted(function: Any, *args: Any) -> bool:
        seen.append((function.__name__, run(function, *args)))
        return seen[-1][1]

    monkeypatch.setattr(fused, "_run", noted)
    monkeypatch.setattr(fused, "WORTH", 2)
    monkeypatch.setattr(fused, "_ready", set())
    return seen


def numbers(bits: int, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    rows = () if channels is None else (channels,)
    t = (0.1 + torch.rand(*rows, 2**bits - 1, generator=generator)).cumsum(-1) - 0.4
    return t, 0.3 + torch.rand(rows, generator=generator), torch.tensor(0.5)


def run(x: Tensor, upstream: Tensor, t: Tensor, step: Tensor, zero: Tensor, how: Surrogate,
        gate: tuple[float, float] | None, axis: int | None) -> list[Tensor]:
    leaves = [v.detach().clone().requires_grad_() for v in (x, t, step)]
    y = staircase(leaves[0], *leaves[1:], step.clone(), zero, how, gate, axis)
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


FULL, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("bits", "mode", "per_channel", "dtype", "layout"), [
    (1, "ramp", False, FULL, "contiguous"), (2, "ramp", False, FULL, "channels_last"),
    (2, "parent", False, FULL, "contiguous"), (2, "ramp", False, HALF, "channels_last"),
    (2, "ste", True, FULL, "contiguous"), (2, "ramp", True, FULL, "channels_last"),
    (2, "ramp", True, FULL, "rows"), (3, "ramp", True, HALF, "contiguous")])
def test_compiled_and_eager_kernels_give_the_same_bits(
        calls: list[tuple[str, bool]], bits: int, mode: str, per_channel: bool, dtype: torch.dtype,
        layout: str) -> None:
    shape = SHAPE if layout != "rows" else (17, 6)
    generator = torch.Generator().manual_seed(0)
    t, step, zero = numbers(bits, 6 if per_channel else None)
    t = t.to(dtype).float()  # so that there are ties
    x = 2 * torch.randn(shape, generator=generator)
    x.view(-1)[:8] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0,
                                   *t.flatten()[:1].expand(3).tolist()])
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    args = (x, upstream, t, step, zero, Surrogate(mode), None, 1 if per_channel else None)
    compiled = run(*args)
    assert [done for _, done in calls] == [True, True]
    fused_size, fused.WORTH = fused.WORTH, sys.maxsize
    try:
        plain = run(*args)
    finally:
        fused.WORTH = fused_size
    assert len(calls) == 2
    for one, two in zip(compiled, plain, strict=True):
        assert one.stride() == two.stride() and one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("bits", "soft", "k", "dtype", "layout"), [
    (1, True, 2.0, FULL, "contiguous"), (2, True, 16.0, FULL, "channels_last"),
    (2, False, 8.0, FULL, "contiguous"), (3, False, 3.0, HALF, "channels_last")])
def test_compiled_and_eager_bells_give_the_same_bits(
        calls: list[tuple[str, bool]], bits: int, soft: bool, k: float, dtype: torch.dtype,
        layout: str, learned: bool) -> None:
    x = 2 * torch.randn(3, 5, 7, 11, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    x = x.to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    t, step, zero = numbers(bits, None)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    upstream = upstream.to(memory_format=torch.channels_last) if layout == "channels_last" \
        else upstream
    x[..., 0] = 0.25 if learned else x[..., 0]  # threshold gradients of NaN would be NaN
    found = []
    for worth in (2, sys.maxsize):
        fused.WORTH = worth
        leaf = x.clone().requires_grad_()
        at, size = (v.clone().requires_grad_(learned) for v in (t, step))
        y = soft_quantizer(leaf, at, size, step, zero, k) if soft else \
            staircase(leaf, at, size, step, zero, Surrogate("sigmoid", k))
        y.backward(upstream)
        found.append([y.detach(), *(v.grad for v in (leaf, at, size) if v.grad is not None)])
    assert calls == [("bell_body", True)] + [("bell_gradients_body", True)] * learned
    for one, two in zip(*found, strict=True):
        assert one.stride() == two.stride()
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert found[0][1].stride() == x.stride()


@pytest.mark.parametrize("worth", [2, sys.maxsize], ids=["compiled", "eager"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_gradient_is_denormal_and_the_others_are_those_of_float64(
        calls: list[tuple[str, bool]], bits: int, learned: bool, worth: int) -> None:
    """A convolution takes far longer where a few numbers are denormal."""
    fused.WORTH = worth
    t, step, zero = numbers(bits, None)
    # below all thresholds: above them 1 - s is 0 in float32
    x = torch.linspace(float(t[0]) - 24, float(t[0]), 4 * 64 * 64).reshape(4, 64, 64)
    leaves = [v.clone().requires_grad_(i == 0 or learned) for i, v in enumerate((x, t, step))]
    soft_quantizer(leaves[0], leaves[1], leaves[2], step, zero, 8.0).backward(
        torch.full_like(x, 1e-6))
    exact = x.double().requires_grad_()
    widths = windows(t, step).widths.double()
    value = torch.sigmoid((exact[..., None] - t.double()) * (8 / widths)).sum(-1)
    ((value - zero) * step.double()).backward(torch.full_like(exact, 1e-6))
    found, expected = leaves[0].grad, exact.grad
    assert found is not None and expected is not None
    tiny = torch.finfo(torch.float32).tiny
    assert ((expected.abs() < tiny) & (expected != 0)).sum() > 50  # some are denormal
    assert ((found == 0) | (found.abs() >= tiny)).all()
    near = expected.abs() > 1e-33  # where float32 still has all its digits
    torch.testing.assert_close(found[near], expected[near].float(), rtol=2e-4, atol=0)
    assert (found[expected.abs() < tiny / 2] == 0).all()


def test_small_gradients_of_half_precision_are_not_zeroed() -> None:
    """Many float16 gradients are denormal: zeros in their place would mask a gradient."""
    t, step, zero = numbers(2, None)
    x = torch.linspace(-2, 2, 1000, dtype=torch.float16).requires_grad_()
    soft_quantizer(x, t, step, step, zero, 2.0).backward(torch.full_like(x, 1e-5))
    assert x.grad is not None and (x.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(("bits", "k", "dtype"), [(8, 2.0, FULL), (8, 64.0, FULL), (4, 8.0, FULL),
                                                  (6, 4.0, HALF)])
def test_many_equally_spaced_bells_are_those_of_all_thresholds(
        calls: list[tuple[str, bool]], bits: int, k: float, dtype: torch.dtype, soft: bool) -> None:
    """Only thresholds within reach are summed; the sigmoids of others are 0 or 1."""
    m = 2**bits - 1
    step = torch.tensor(0.37)
    for zero in (torch.tensor(0.0), torch.tensor(m / 2 + 0.5 * (m % 2))):
        t = step * (torch.arange(1, m + 1) - 0.5 - zero)
        x = step * (m * torch.rand(40_000, generator=torch.Generator().manual_seed(0)) - zero) * 1.2
        x[:7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0])
        x = x.to(dtype)
        found = []
        for worth in (2, sys.maxsize):
            fused.WORTH = worth
            leaf = x.clone().requires_grad_()
            y = soft_quantizer(leaf, t, step, step, zero, k) if soft else \
                staircase(leaf, t, step, step, zero, Surrogate("sigmoid", k))
            y.backward(torch.ones_like(x))
            found.append((y.detach(), leaf.grad))
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        wide = x.double().unsqueeze(-1)
        s = torch.sigmoid(k / step * (wide - t))
        value = (s if soft else (x.float().unsqueeze(-1) > t).double()).sum(-1) - zero
        slope = (k * s * (1 - s)).sum(-1)
        low = 4e-3 if dtype == HALF else 3e-6
        torch.testing.assert_close(found[0][0][1:].double(), (value * step)[1:], rtol=low,
                                   atol=low + float(m * step) * 2**-22)
        torch.testing.assert_close(found[0][1][1:].double(), slope[1:], rtol=low, atol=k * low)
        assert found[0][0][0].isnan()
    assert ("bell_computed_body", True) in calls


@pytest.mark.parametrize("way", ["compiled", "eager"])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("bits", range(4, 9))
def test_equally_spaced_thresholds_are_computed_to_the_bit(
        calls: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, bits: int,
        axis: int | None, way: str) -> None:
    generator, m = torch.Generator().manual_seed(bits), 2**bits - 1
    if way == "eager":
        monkeypatch.setattr(fused, "WORTH", sys.maxsize)
    for zero in (0.0, 0.5, float(m // 3)):
        step = 10 ** (6 * torch.rand(() if axis is None else (4,), generator=generator) - 3)
        t = step.unsqueeze(-1) * (torch.arange(1, m + 1) - 0.5 - zero)
        assert slope_tables(t, step, step, torch.tensor(zero), "ramp").computed
        edges = windows(t, step).edges
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, -1e38])
        near = [t, t.nextafter(t + 1), t.nextafter(t - 1), edges, edges.nextafter(edges + 1),
                special.expand(*step.shape, 7),
                step.unsqueeze(-1) * (m * torch.randn(*step.shape, 200, generator=generator))]
        x = torch.cat(near, -1)
        grad = torch.randn(x.shape, generator=generator)
        level, bounds = torch.searchsorted(t, x), torch.searchsorted(edges, x)
        value = torch.where(x.isnan(), x, (level - zero) * step.unsqueeze(-1))
        slope = torch.cat([torch.zeros_like(edges[..., :1]), step.unsqueeze(-1) / windows(
            t, step).widths, torch.zeros_like(edges[..., :1])], -1).gather(
                -1, bounds.where(~x.isnan(), 0))
        if axis is not None:
            x, grad, value, slope = (v.T.contiguous() for v in (x, grad, value, slope))
        y, dx, *_ = run(x, grad, t, step, torch.tensor(zero), Surrogate(), None, axis)
        torch.testing.assert_close(y, value, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(dx, grad * slope, rtol=0, atol=0)
        alone = x.clone().requires_grad_()
        staircase(alone, t, step, step, torch.tensor(zero), axis=axis).backward(grad)
        assert torch.equal(alone.grad, dx)  # type: ignore[arg-type]
        # If one is off by a bit, they are compared one by one.
        t[..., m // 2] = t[..., m // 2].nextafter(t[..., -1])
        assert not slope_tables(t, step, step, torch.tensor(zero), "ramp").computed
    assert ("encode_computed_body", True) in calls if way == "compiled" else not calls


def test_a_wrong_kernel_is_noticed(calls: list[tuple[str, bool]],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, out: Tensor, code: Tensor, t: Tensor, *rest: Any) -> None:
        right_encode(x, out, code, t.nextafter(t + 1), *rest)

    right_encode = fused.encode_body
    t = numbers(2, None)[0]
    x = t.nextafter(t + 1).repeat(9)
    args = (x, torch.ones(27), *numbers(2, None), Surrogate(), None, None)
    right = run(*args)
    monkeypatch.setattr(fused, "encode_body", wrong)
    monkeypatch.setattr(fused, "_compiled", lambda function, *_: function)
    assert not torch.equal(run(*args)[0], right[0])


def test_small_tensors_and_many_thresholds_are_not_compiled(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_run", lambda *_: pytest.fail("compiled"))
    small, large = torch.zeros(100), torch.zeros(fused.WORTH)
    for x, bits in ((small, 2), (large, 5)):
        t, step, zero = numbers(bits, None)
        run(x, torch.ones_like(x), t, step, zero, Surrogate(), None, None)
    t, step, zero = numbers(2, None)
    staircase(large, t, step, step, zero)  # without a gradient nothing is compiled


@pytest.mark.parametrize("error", ["compiler", "other"])
def test_kernels_that_do_not_compile_run_eagerly(calls: list[tuple[str, bool]], error: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler
    raised = InvalidCxxCompiler() if error == "compiler" else ZeroDivisionError("ours")
    tries = []

    def refuse(*key: Any) -> Any:
        tries.append(key)
        raise raised

    monkeypatch.setattr(fused, "_compiled", refuse)
    monkeypatch.setattr(fused, "_failed", set())
    x = torch.randn(50)
    args = (x, torch.ones(50), *numbers(2, None), Surrogate(), None, None)
    if error == "other":
        with pytest.raises(ZeroDivisionError):
            run(*args)
        return
    first, second = run(*args), run(*args)
    assert [done for _, done in calls] == [False] * 4 and len(tries) == 2
    assert all(map(torch.equal, first, second))


def test_nothing_is_compiled_where_torch_compile_is_switched_off(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "WORTH", 2)
    monkeypatch.setattr(fused, "_run", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(fused, "_switched_off", lambda: True)
    run(torch.randn(50), torch.ones(50), *numbers(2, None), Surrogate(), None, None)


def test_function_modes_do_not_see_the_kernels(calls: list[tuple[str, bool]]) -> None:
    names = []

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None,
                               ) -> Any:
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    module = QuantActivation(QuantSpec(2, True), nn.ReLU())
    x = torch.randn(4, 3, 5, requires_grad=True)
    expected = module(x)
    with Recording():
        y = module(x)
    y.sum().backward()
    assert torch.equal(y, expected) and all(done for _, done in calls)
    assert "copy_" not in names


def test_tensors_without_memory_are_not_compiled(calls: list[tuple[str, bool]]) -> None:
    from torch._subclasses import FakeTensorMode
    t, step, zero = numbers(2, None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(4, 3))
        assert not fused.encode(x, t, torch.arange(4.0), step, zero, None, False, x.clone(),
                                torch.empty_like(x, dtype=torch.uint8))
    assert not calls


def test_many_sizes_share_a_compilation(calls: list[tuple[str, bool]]) -> None:
    from torch._dynamo.utils import counters
    module = QuantActivation(QuantSpec(2, True, True), nn.ReLU(), channels=7)

    def use(*shape: int) -> None:
        module.base = module.base[:1].expand(shape[1], -1).contiguous()
        module._start_from(module.base, torch.ones(shape[1]), torch.ones(shape[1]),
                           module.zero_level)
        module(torch.randn(shape, requires_grad=True)).sum().backward()

    for shape in ((5, 7, 9, 10), (6, 8, 11, 12)):
        use(*shape)
    before = counters["stats"]["unique_graphs"]
    for n in range(5, 12):
        use(n + 1, n + 6, n + 13, n)
    assert counters["stats"]["unique_graphs"] == before and all(done for _, done in calls)


def test_a_whole_step_is_the_same_bits(calls: list[tuple[str, bool]]) -> None:
    found = []
    for worth in (2, sys.maxsize):
        fused.WORTH = worth
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), QuantActivation(QuantSpec(2, True), nn.ReLU()),
                            nn.Conv2d(6, 6, 3), QuantActivation(QuantSpec(3), nn.GELU()),
                            nn.Flatten(), nn.Linear(6 * 5 * 5, 4))
        x = torch.randn(8, 3, 9, 9, requires_grad=True)
        with backward(net, "ste"):
            net(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(one is two is None or torch.equal(one, two) for one, two in zip(*found, strict=True))
