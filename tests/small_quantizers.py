"""Small quantized activations with known thresholds, their outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from quantguard.core.specs import QuantSpec
from quantguard.nn.contexts import backward, bypass, observing, soften
from quantguard.nn.functional.staircase import MODES
from quantguard.nn.quant_activation import QuantActivation

T3 = [0.5, 1.25, 2.5]
X = torch.linspace(-2, 4, 49)


def three(dynamic: bool = False) -> QuantActivation:
    return QuantActivation.from_thresholds(T3, step=0.75, zero=1, dynamic=dynamic)


FUNCTIONS = [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.3),
             nn.ELU(), nn.Hardswish()]


def after(function: nn.Module, dynamic: bool = False, inplace: bool = False) -> QuantActivation:
    module = QuantActivation(QuantSpec(2, dynamic), function, inplace=inplace)
    module.set_thresholds(T3, 0.75)
    return module


def switches() -> dict[str, Callable[[nn.Module], AbstractContextManager[nn.Module]]]:
    return {
        "bypass": bypass, "soften": lambda m: soften(m, 4.0), "softer": lambda m: soften(m, 2),
        **{mode: lambda m, mode=mode: backward(m, mode) for mode in (*MODES[1:], "sigmoid(3)")},
        "observing": lambda m: observing(m, {})}


def behaviour(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    y = module(x)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(after(nn.ReLU()), nn.Sequential(after(nn.GELU())))
