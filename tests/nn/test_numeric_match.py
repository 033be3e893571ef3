"""Activations written as arithmetic are recognised, and other arithmetic is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantguard.nn.activation_kinds import kind_of
from quantguard.nn.numeric_match import Spelled, TensorShadows, operation

SLOPE = nn.Parameter(torch.tensor(0.7))
WEIGHT = nn.Parameter(torch.linspace(-1, 2, 7))


class Follow(TorchFunctionMode):
    """Function mode that follows tensors and records the recognised activations."""

    def __init__(self) -> None:
        super().__init__()
        self.shadows = TensorShadows()
        self.found: list[Spelled] = []

    def __torch_function__(self, func, _types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            found = self.shadows.ran(result, func, args, kwargs or {})
            if found is not None and kind_of(func) is None:
                self.found.append(found)
        return result


def last_kind(expression: Callable[[Tensor], Tensor]) -> str | None:
    x = torch.randn(7)
    with Follow() as follow:
        expression(x)
    return follow.found[-1].kind if follow.found else None


@pytest.mark.parametrize(("kind", "expression"), [
    ("relu", lambda x: x * (x > 0)), ("relu", lambda x: (x >= 0).float() * x),
    ("relu", lambda x: x.clamp(min=0)), ("relu", lambda x: x.clone().clamp_(min=0)),
    ("relu", lambda x: torch.clip(x, 0)), ("relu", lambda x: torch.clamp_min(x, 0)),
    ("relu", lambda x: torch.maximum(x, torch.zeros_like(x))),
    ("relu", lambda x: torch.max(x, x.new_zeros(()))),
    ("relu", lambda x: torch.where(x > 0, x, 0.0)), ("relu", lambda x: x.masked_fill(x < 0, 0)),
    ("relu", lambda x: (x + x.abs()) / 2), ("relu", lambda x: 0.5 * (x.abs() + x)),
    ("relu", lambda x: -torch.minimum(-x, torch.zeros_like(x))),
    ("relu6", lambda x: x.clamp(0, 6)), ("relu6", lambda x: F.relu(x).clamp(max=6)),
    ("hardtanh", lambda x: x.clamp(-1, 1)),
    ("leaky_relu", lambda x: torch.where(x > 0, x, 0.2 * x)),
    ("leaky_relu", lambda x: torch.maximum(x, 0.01 * x)),
    ("silu", lambda x: x * torch.sigmoid(x)), ("silu", lambda x: torch.sigmoid(x) * x),
    ("silu", lambda x: x / (1 + torch.exp(-x))), ("silu", lambda x: x * torch.sigmoid(0.7 * x)),
    ("silu", lambda x: x * torch.sigmoid(SLOPE * x)),
    ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi)
                                                 * (x + 0.044715 * x.pow(3))))),
    ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    ("hardswish", lambda x: x * F.relu6(x + 3) / 6), ("hardswish", lambda x: x * F.hardsigmoid(x)),
    ("hardsigmoid", lambda x: F.relu6(x + 3) / 6),
    ("hardsigmoid", lambda x: F.relu6(x + 3) * (1 / 6)),
    ("hardsigmoid", lambda x: (x + 3).clamp(0, 6) / 6),
    ("hard_mish", lambda x: 0.5 * x * (x + 2).clamp(0, 2)),
    ("softplus", lambda x: torch.log(1 + torch.exp(x))),
    ("softplus", lambda x: torch.log1p(x.exp())), ("softsign", lambda x: x / (1 + x.abs())),
    ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    ("tanh", lambda x: 2 * torch.sigmoid(2 * x) - 1),
    ("silu", lambda x: x * torch.sigmoid(x * WEIGHT)),  # EvoNorm
    ("tlu", lambda x: torch.maximum(x, WEIGHT.view(7))), ("tlu", lambda x: x.clamp(min=WEIGHT)),
    ("relu", lambda x: (lambda h: h * (h > 0))(x * 2 + 1)),  # of an intermediate value
])
def test_spellings(kind: str, expression: Callable[[Tensor], Tensor]) -> None:
    assert last_kind(expression) == kind


@pytest.mark.parametrize("expression", [
    lambda x: x, lambda x: x * 1, lambda x: 2 * x + 1, lambda x: x * x, lambda x: x.abs(),
    lambda x: x.clamp(0, 1), lambda x: x.clamp(min=1e-6), lambda x: x.clamp(min=-1),
    lambda x: x.clamp(max=0), lambda x: x.exp(), lambda x: (x * x).sqrt(), lambda x: x > 0,
    lambda x: x * (x < 0), lambda x: x * (x.flip(0) > 0), lambda x: x * torch.rand_like(x),
    lambda x: x * x.mean(), lambda x: x * torch.sigmoid(x.mean()), lambda x: x - x.mean(),
    lambda x: F.relu(x) * 2, lambda x: F.relu(x) * 1.0, lambda x: F.relu(x) + 0, lambda x: x / 6,
    lambda x: torch.where(x > 0, x, x.exp()), lambda x: torch.maximum(x, 2 * x),
    lambda x: x + 1e-6, lambda x: x * WEIGHT, lambda x: x + WEIGHT, lambda x: F.relu(x) * WEIGHT,
    lambda x: torch.max(x, dim=0)[0], lambda x: x * torch.sigmoid(-x), lambda x: x.reciprocal(),
])
def test_other_arithmetic_is_no_activation(expression: Callable[[Tensor], Tensor]) -> None:
    assert last_kind(expression) is None


def test_the_root_and_the_parts_of_a_spelling_are_known() -> None:
    with Follow() as follow:
        x = torch.randn(7)
        h = x @ torch.eye(7)
        gate = torch.sigmoid(h)
        y = h * gate
    found = follow.found[-1]
    assert found.root == follow.shadows.number(h)
    assert follow.shadows.number(gate) in found.through
    assert follow.shadows.number(y) not in found.through


def test_an_overwritten_value_is_another_value() -> None:
    with Follow() as follow:
        x = torch.randn(7)
        before = follow.shadows.number(x)
        x.mul_(x > 0)
        assert follow.found[-1].root == before
        assert follow.shadows.number(x) != before


@pytest.mark.parametrize(("function", "name"), [
    (Tensor.__rmul__, "mul"), (Tensor.__imul__, "mul"), (Tensor.mul_, "mul"), (torch.mul, "mul"),
    ("clamp_", "clamp"), (torch.relu_, "relu"), (Tensor.__rsub__, "rsub"), (torch.rsqrt, "rsqrt")])
def test_operations_have_one_name(function: object, name: str) -> None:
    assert operation(function) == name
