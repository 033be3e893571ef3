"""Foreign rounding gets a gradient while attacking, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard.attacks import PGD, FoolboxModel
from quantguard.attacks._foolbox import fb
from quantguard.straight import straight_through


class ZeroRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class Scaled(torch.autograd.Function):
    """An honest Function: its gradient must stay its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round, "method": lambda x: x.round(), "floor": torch.floor, "ceil": torch.ceil,
    "trunc": torch.trunc, "decimals": lambda x: torch.round(x, decimals=1), "sign": torch.sign,
    "in place": lambda x: (x * 1).round_(), "sign in place": lambda x: (x * 1).sign_(),
    "Function": lambda x: ZeroRound.apply(x)}


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (g,) = torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum(), leaf)
    return y.detach(), g


@pytest.mark.parametrize("name", FLAT)
def test_same_values_and_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    plain, flat = gradient(FLAT[name], x)
    with straight_through():
        seen, g = gradient(FLAT[name], x)
    assert torch.equal(plain, seen) and not flat.any()
    weights = torch.arange(1.0, 21).view(4, 5)
    if "sign" not in name:
        assert torch.equal(g, weights)
    else:
        scale = 2 / x.abs().mean(1, keepdim=True)
        assert torch.allclose(g, weights * scale / (x * scale).cosh().square(), rtol=1e-4)
    assert not gradient(FLAT[name], x)[1].any()  # and afterwards it is what it was


@pytest.mark.parametrize("f", [
    lambda x: Scaled.apply(x), torch.relu, lambda x: x.clamp(0, 1), torch.sin])
def test_an_honest_gradient_is_left_alone(f: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    expected = gradient(f, x)
    with straight_through():
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found))


def test_only_the_image_whose_gradient_vanishes_is_helped() -> None:
    class Masks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0] * torch.tensor([[0.0], [1.0]])
    with straight_through():
        _, g = gradient(lambda x: Masks.apply(x), torch.ones(2, 3))
    assert torch.equal(g, torch.tensor([[1.0, 2, 3], [8, 10, 12]]))


def test_apply_is_put_back_after_an_exception() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(ZeroDivisionError), straight_through():
        1 / 0  # noqa: B018
    assert torch.autograd.Function.__dict__["apply"] is before


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(4 * torch.relu(x)) / 4


def test_an_attack_finds_its_way_through_foreign_rounding(cnn: nn.Module,
                                                          digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(Rounded() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x, y = digits[0][:60], digits[1][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        found = PGD("ce", 20, noise=0.0, **options).run(
            FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.15)
        return int((model(found).argmax(1) != y).sum())
    assert broken(see_through=False) == 0
    assert broken() > 40
