"""Foreign rounding gets a gradient while attacking, and computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard.attacks import APGD, PGD, FoolboxModel
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


@pytest.mark.parametrize("name", FLAT)
def test_softened_steps_are_smooth_and_become_the_step(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 500) * 3
    with straight_through(2.0) as mode:
        soft, slope = gradient(FLAT[name], x)
        nearby, _ = gradient(FLAT[name], x + 1e-3)
    assert mode.met
    with straight_through(20000.0):
        hard, _ = gradient(FLAT[name], x)
    plain, _ = gradient(FLAT[name], x)
    assert hard.isclose(plain).float().mean() > 0.97
    assert soft.isclose(plain).float().mean() < 0.7
    # a mean over a window moves little, and as its slope says on the whole
    assert float((nearby - soft).abs().mean()) < 0.02
    assert float((slope != 0).float().mean()) > 0.5


@pytest.mark.parametrize("f", [
    lambda x: Scaled.apply(x), torch.relu, lambda x: x.clamp(0, 1), torch.sin])
def test_what_is_honest_is_not_softened(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5)
    expected = gradient(f, x)
    with straight_through(2.0) as mode:
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found)) and not mode.met


class MeanOfRow(torch.autograd.Function):
    """Not one number to one number: its window is not its input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand(x.shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def test_a_dead_function_that_mixes_numbers_is_not_softened() -> None:
    x = torch.randn(4, 5)
    with straight_through(2.0) as mode:
        y, g = gradient(lambda x: MeanOfRow.apply(x), x)
    assert not mode.met and torch.equal(y, gradient(lambda x: MeanOfRow.apply(x), x)[0])
    assert g.any()  # it goes straight through


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
def test_the_twin_sees_through_foreign_steps_and_judges_by_the_model(
        make: Any, cnn: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(ZeroStep() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x = digits[0][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        wrapped = FoolboxModel(model)
        found = make("ce", 20, noise=0.0, **options).run(
            wrapped, x, fb.criteria.Misclassification(y), epsilon=0.1)
        assert wrapped.module.foreign is True
        return int((model(found).argmax(1) != y).sum())
    straight, twin = broken(), broken(twin=(2, 32))
    assert twin >= straight and twin > 45


class Indexing(nn.Module):
    """Rounds to look up: what is softened is no index."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        which = x.mean(1).round()
        if not torch.equal(which, which.long().float()):
            raise IndexError("no such row")
        return self.last(self.table[which.long()] * x)  # type: ignore[no-any-return]


def test_a_model_that_does_not_run_softened_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    wrapped, x = FoolboxModel(Indexing().eval()), torch.rand(6, 4)
    y = wrapped.module(x).argmax(1)
    found = PGD("ce", 5, twin=(2, 16)).run(wrapped, x, fb.criteria.Misclassification(y),
                                           epsilon=0.1)
    assert wrapped.module.foreign is False and found.shape == x.shape


COMPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "counted": lambda x: (x.unsqueeze(-1) > torch.tensor([-0.5, 0.0, 0.7])).sum(-1).float(),
    "masked": lambda x: x.detach() * (x > 0.2),
    "where": lambda x: torch.where(x < 0.2, 0.0, 1.0),
    "cast": lambda x: (x >= 0.1).to(torch.float32) + (x >= 0.4).float(),
    "logic": lambda x: (~((x > 0.1) & (x < 1.0)) | (x > 2.0)).float(),
    "shaped": lambda x: (x.flatten() > 0.0).reshape(x.shape).type(torch.float32)}


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_are_softened_where_their_result_is_computed_with(name: str) -> None:
    f, x = COMPARED[name], 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))

    def with_gradient(x: Tensor) -> Tensor:
        return f(x) + 0 * x  # what has no gradient at all is nothing to differentiate
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
    with straight_through() as mode:  # straight-through there are booleans
        assert torch.equal(gradient(with_gradient, x)[0], plain) and not mode.met


@pytest.mark.parametrize("f", [
    lambda x: x[x > 0].sum() + 0 * x, lambda x: x.masked_fill(x > 0, 0.0),
    lambda x: x if (x > 0).any() else -x, lambda x: torch.where(x > 0, x, -torch.inf).exp(),
    lambda x: x + int((x > 0).sum(dtype=torch.int64)), lambda x: (x > 0).long() * x,
    lambda x: x * torch.stack([x > 0, x < 1]).all()])
def test_who_indexes_or_branches_by_a_comparison_gets_booleans(
        f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = gradient(f, x)
    with straight_through(2.0):
        found = gradient(f, x)
    assert all(map(torch.equal, expected, found))


class Compared(nn.Module):
    """A staircase that a tracer wrote as comparisons: no gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) > torch.tensor([0.1, 0.4, 0.9])).sum(-1).float() * 0.5 + 0 * x


def test_the_twin_sees_through_comparisons(cnn: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(*(Compared() if isinstance(m, nn.ReLU) else m for m in cnn)).eval()
    x = digits[0][:60]
    y = model(x).argmax(1)

    def broken(**options: Any) -> int:
        found = PGD("ce", 20, noise=0.0, **options).run(
            FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.1)
        return int((model(found).argmax(1) != y).sum())
    # by the line through the steps, and by their softened form
    assert broken(see_through=False) == 0 and broken() > 30 and broken(twin=(2, 32)) > 40


def test_half_precision_is_softened_by_the_same_scale() -> None:
    x = 300 * torch.linspace(-1, 1, 4001).repeat(2, 1)  # squares add up to more than float16 holds
    for step, apart in ((torch.sign, 0.02), (torch.round, 1.0)):
        wide, narrow = x.clone().requires_grad_(), x.half().requires_grad_()
        with straight_through(4.0):
            assert torch.allclose(step(wide), step(narrow).float(), rtol=1e-2, atol=apart)
