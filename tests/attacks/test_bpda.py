"""BPDA: rounding, signs and comparisons get a gradient under attack, or are softened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard.attacks import APGD, PGD, FoolboxModel
from quantguard.attacks.base import fb
from quantguard.attacks.bpda import straight_through


class ZeroRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class Scaled(torch.autograd.Function):
    """A differentiable Function, whose gradient must not change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round, "method": lambda x: x.round(), "floor": torch.floor, "ceil": torch.ceil,
    "trunc": torch.trunc, "decimals": lambda x: torch.round(x, decimals=1), "sign": torch.sign,
    "in place": lambda x: (x * 1).round_(), "sign in place": lambda x: (x * 1).sign_(),
    "Function": lambda x: ZeroRound.apply(x)}


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    (g,) = torch.autograd.grad((y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum(), leaf)
    return y.detach(), g


@pytest.mark.parametrize("name", OPERATIONS)
def test_same_values_and_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    plain, flat = gradient(OPERATIONS[name], x)
    with straight_through():
        seen, g = gradient(OPERATIONS[name], x)
    assert torch.equal(plain, seen) and not flat.any()
    weights = torch.arange(1.0, 21).view(4, 5)
    if "sign" not in name:
        assert torch.equal(g, weights)
    else:
        scale = 2 / x.abs().mean(1, keepdim=True)
        assert torch.allclose(g, weights * scale / (x * scale).cosh().square(), rtol=1e-4)
    assert not gradient(OPERATIONS[name], x)[1].any()  # restored after the context


@pytest.mark.parametrize("f", [
    lambda x: Scaled.apply(x), torch.relu, lambda x: x.clamp(0, 1), torch.sin])
def test_nonzero_gradients_do_not_change(f: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    expected = gradient(f, x)
    with straight_through():
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found))


def test_only_images_with_a_zero_gradient_get_another() -> None:
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


def test_apply_is_restored_after_an_exception() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(ZeroDivisionError), straight_through():
        1 / 0  # noqa: B018
    assert torch.autograd.Function.__dict__["apply"] is before


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(4 * torch.relu(x)) / 4


def test_pgd_gets_a_gradient_through_rounding(cnn: nn.Module,
                                                          digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(Rounded() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x, y = digits[0][:60], digits[1][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        found = PGD("ce", 20, noise=0.0, **options).run(
            FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.15)
        return int((model(found).argmax(1) != y).sum())
    assert broken(bpda=False) == 0
    assert broken() > 40


@pytest.mark.parametrize("name", OPERATIONS)
def test_softened_operations_are_smooth_and_converge(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 500) * 3
    with straight_through(2.0) as mode:
        soft, slope = gradient(OPERATIONS[name], x)
        nearby, _ = gradient(OPERATIONS[name], x + 1e-3)
    assert mode.met
    with straight_through(20000.0):
        hard, _ = gradient(OPERATIONS[name], x)
    plain, _ = gradient(OPERATIONS[name], x)
    assert hard.isclose(plain).float().mean() > 0.97
    assert soft.isclose(plain).float().mean() < 0.7
    # a mean over a window changes little, and most of its slopes are not zero
    assert float((nearby - soft).abs().mean()) < 0.02
    assert float((slope != 0).float().mean()) > 0.5


@pytest.mark.parametrize("f", [
    lambda x: Scaled.apply(x), torch.relu, lambda x: x.clamp(0, 1), torch.sin])
def test_differentiable_operations_are_not_softened(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5)
    expected = gradient(f, x)
    with straight_through(2.0) as mode:
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found)) and not mode.met


class MeanOfRow(torch.autograd.Function):
    """Not elementwise, so that it has no window around an input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand(x.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def test_a_flat_function_that_is_not_elementwise_is_not_softened() -> None:
    x = torch.randn(4, 5)
    with straight_through(2.0) as mode:
        y, g = gradient(lambda x: MeanOfRow.apply(x), x)
    assert not mode.met and torch.equal(y, gradient(lambda x: MeanOfRow.apply(x), x)[0])
    assert g.any()  # straight-through instead


class ZeroSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.3).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class ZeroStep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ZeroSign.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [PGD, APGD])
def test_flat_functions_are_softened_and_the_model_judges(
        make: Any, cnn: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(ZeroStep() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x = digits[0][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        wrapped = FoolboxModel(model)
        found = make("ce", 20, noise=0.0, **options).run(
            wrapped, x, fb.criteria.Misclassification(y), epsilon=0.1)
        assert wrapped.module.softenable is True
        return int((model(found).argmax(1) != y).sum())
    straight_through, softened = broken(), broken(sharpness=(2, 32))
    assert softened >= straight_through and softened > 45


class Indexing(nn.Module):
    """Uses rounded values as indices, which fails when they are softened."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        row = x.mean(1).round()
        if not torch.equal(row, row.long().float()):
            raise IndexError("no such row")
        return self.last(self.table[row.long()] * x)  # type: ignore[no-any-return]


def test_a_model_that_does_not_run_softened_is_attacked_unsoftened() -> None:
    torch.manual_seed(0)
    wrapped, x = FoolboxModel(Indexing().eval()), torch.rand(6, 4)
    y = wrapped.module(x).argmax(1)
    found = PGD("ce", 5, sharpness=(2, 16)).run(wrapped, x, fb.criteria.Misclassification(y),
                                           epsilon=0.1)
    assert wrapped.module.softenable is False and found.shape == x.shape


COMPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "counted": lambda x: (x.unsqueeze(-1) > torch.tensor([-0.5, 0.0, 0.7])).sum(-1).float(),
    "masked": lambda x: x.detach() * (x > 0.2),
    "where": lambda x: torch.where(x < 0.2, 0.0, 1.0),
    "cast": lambda x: (x >= 0.1).to(torch.float32) + (x >= 0.4).float(),
    "logic": lambda x: (~((x > 0.1) & (x < 1.0)) | (x > 2.0)).float(),
    "shaped": lambda x: (x.flatten() > 0.0).reshape(x.shape).type(torch.float32)}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_are_softened_in_computations(name: str) -> None:
    f, x = COMPARED[name], 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))

    def with_gradient(x: Tensor) -> Tensor:
        return f(x) + 0 * x  # so that autograd has a path to x
    plain, flat = gradient(with_gradient, x)
    assert not flat.any()
    with straight_through(2.0) as mode:
        soft, slope = gradient(with_gradient, x)
        nearby, _ = gradient(with_gradient, x + 1e-3)
    assert mode.met and float((slope != 0).float().mean()) > 0.9
    assert float((nearby - soft).abs().mean()) < 0.02
    with straight_through(20000.0):
        hard, _ = gradient(with_gradient, x)
    assert hard.isclose(plain, atol=1e-3).float().mean() > 0.97
    with straight_through() as mode:  # comparisons are never straight-through
        assert torch.equal(gradient(with_gradient, x)[0], plain) and not mode.met


@pytest.mark.parametrize("f", [
    lambda x: x[x > 0].sum() + 0 * x, lambda x: x.masked_fill(x > 0, 0.0),
    lambda x: x if (x > 0).any() else -x, lambda x: torch.where(x > 0, x, -torch.inf).exp(),
    lambda x: x + int((x > 0).sum(dtype=torch.int64)), lambda x: (x > 0).long() * x,
    lambda x: x * torch.stack([x > 0, x < 1]).all()])
def test_indexing_and_branching_get_booleans(
        f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = gradient(f, x)
    with straight_through(2.0):
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found))


class Compared(nn.Module):
    """A quantizer that is written as comparisons, without any gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) > torch.tensor([0.1, 0.4, 0.9])).sum(-1).float() * 0.5 + 0 * x


def test_attacks_get_a_gradient_through_comparisons(cnn: nn.Module,
                                                    digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(Compared() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x = digits[0][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        found = PGD("ce", 20, noise=0.0, **options).run(
            FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.1)
        return int((model(found).argmax(1) != y).sum())
    # by the line through the steps, and by softened steps
    assert broken(bpda=False) == 0 and broken() > 30 and broken(sharpness=(2, 32)) > 40


def test_half_precision_is_softened_by_the_same_scale() -> None:
    x = 300 * torch.linspace(-1, 1, 4001).repeat(2, 1)  # the sum of squares overflows float16
    for step, apart in ((torch.sign, 0.02), (torch.round, 1.0)):
        wide, narrow = x.clone().requires_grad_(), x.half().requires_grad_()
        with straight_through(4.0):
            assert torch.allclose(step(wide), step(narrow).float(), rtol=1e-2, atol=apart)
