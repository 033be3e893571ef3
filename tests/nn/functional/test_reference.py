"""The staircase in plain operations: the same function and gradients, for compilers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard import backward, bypass, convert, soften
from quantguard.core.specs import QuantSpec
from quantguard.nn.functional import reference as plain
from quantguard.nn.functional.staircase import Surrogate, soft_quantizer, staircase
from quantguard.nn.functional.surrogates import windows
from quantguard.nn.quant_activation import QuantActivation

THRESHOLDS = {1: [0.4], 2: [0.2, 0.9, 1.3], 6: (torch.arange(63) / 20 - 1).tolist()}


def numbers(bits: int, channels: int | None) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor(THRESHOLDS[bits])
    step, width = torch.tensor(0.7), torch.tensor(0.6)
    if channels is not None:
        t = t + torch.arange(channels).unsqueeze(1) / 7
        step, width = step + torch.arange(channels) / 5, width.expand(channels)
    return t, step, width


def gradients(y: Tensor, *of: Tensor) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), of))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("bits", THRESHOLDS)
@pytest.mark.parametrize("mode", ["ramp", "ste", "parent", "parent gated", "sigmoid", "soft"])
def test_both_forms_agree(mode: str, bits: int, channels: int | None) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)) * 2
    x.flatten()[:3] = torch.tensor([0.0, 0.9, 30.0])  # an edge, a threshold, far outside
    t, step, width = numbers(bits, channels)
    zero, axis = torch.tensor(0.5), None if channels is None else 1
    results = []
    for form in ("eager", "plain"):
        xs, ts, steps = (v.clone().requires_grad_() for v in (x, t, step))
        edges, widths = windows(ts, width)
        gate = (0.0, 1.0) if mode == "parent gated" else None
        name = mode.split()[0]
        if form == "eager" and mode == "soft":
            y = soft_quantizer(xs, ts, steps, width, zero, 5.0, axis)
        elif form == "eager":
            y = staircase(xs, ts, steps, width, zero, Surrogate(name, 8.0), gate, axis)
        elif mode == "soft":
            y = plain.soft(xs, ts, steps, widths, zero, 5.0, axis)
        elif mode == "sigmoid":
            y = plain.belled(xs, ts, steps, widths, zero, 8.0, axis)
        else:
            y = plain.windowed(xs, ts, steps, edges, widths, zero, name, gate, axis)
        results.append((y, gradients(y, xs, ts, steps)))
    (eager, eager_grads), (other, other_grads) = results
    assert torch.equal(eager, other) or (mode == "soft" and torch.allclose(eager, other, atol=1e-5))
    for one, two in zip(eager_grads, other_grads, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)
    if mode == "ramp" and bits == 2:  # unequal gaps: the comparison can fail
        y = plain.windowed(xs, ts, steps, edges, widths, zero, "ste", None, axis)
        assert not torch.allclose(gradients(y, xs)[0], eager_grads[0], rtol=1e-3, atol=1e-4)


def test_nan_stays_nan_and_infinities_get_the_outer_levels() -> None:
    t, step, width = numbers(2, None)
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], requires_grad=True)
    y = plain.windowed(x, t, step, *windows(t, width), torch.tensor(0.0), "ramp", None, None)
    assert y.isnan().tolist() == [True, False, False]
    assert torch.equal(y[1:], torch.tensor([3 * 0.7, 0.0]))
    y.nansum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


@pytest.fixture(params=[False, True], ids=["fixed", "dynamic"])
def converted(request: Any) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                        nn.GELU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    yield convert(net, 2, dynamic=request.param, example=torch.randn(2, 3, 8, 8))
    torch.compiler.reset()


def test_torch_compile_sees_no_graph_break_and_the_contexts(converted: nn.Module) -> None:
    x = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    contexts = (nullcontext, lambda: bypass(converted), lambda: soften(converted, 4.0),
                lambda: backward(converted, "ste"))
    for context in contexts:
        outputs, inputs = [], []
        for model in (converted, compiled):
            z = x.clone().requires_grad_()
            with context():
                y = model(z)
            inputs.append(torch.autograd.grad(y.square().sum(), z)[0])
            outputs.append(y)
        assert torch.allclose(*outputs, atol=1e-6)
        assert torch.allclose(*inputs, rtol=1e-3, atol=1e-5)


def test_torch_export_gives_the_same_outputs(converted: nn.Module) -> None:
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(converted, (x,))
    assert torch.equal(program.module()(x), converted(x))
    assert any("quantguard" in str(node.meta.get("nn_module_stack")) or "gt" in str(node.target)
               for node in program.graph.nodes)


def test_a_quantizer_compiles_with_any_number_of_bits() -> None:
    for bits in (1, 3, 8):
        module = QuantActivation(QuantSpec(bits), nn.ReLU())
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        x = torch.randn(100) * 2**bits
        assert torch.equal(compiled(x), module(x))
        torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("context", [lambda _: nullcontext(), lambda m: soften(m, 4.0), bypass,
                                     lambda m: backward(m, "sigmoid")])
def test_torch_func_maps_and_differentiates(context: Any, dynamic: bool) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
                  QuantSpec(2, dynamic), data=[x])
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, (images,)).square().sum()

    with context(net):
        whole = torch.func.grad(loss)(parameters, x)
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        expected = torch.autograd.grad(net(x).square().sum(), list(parameters.values()),
                                   allow_unused=True)
        for (name, value), gradient in zip(whole.items(), expected, strict=True):
            gradient = torch.zeros_like(value) if gradient is None else gradient
            torch.testing.assert_close(value, gradient, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(each[name].sum(0), value, rtol=1e-5, atol=1e-5)
        rows = torch.func.vmap(torch.func.jacrev(net))(x)
        assert rows.shape == (5, 3, 4) and bool((rows != 0).any())
