"""Weights are channels last during attacks, where that changes outputs by rounding only."""

from __future__ import annotations

from collections.abc import Callable

import foolbox as fb
import pytest
import torch
from torch import Tensor, nn

from quantguard import Threat, convert
from quantguard.attacks import PGD, FoolboxModel, PixelModel
from quantguard.nn.memory_format import channels_last, order_weights, takes_channels_last

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])


class Net(nn.Module):
    """Two convolutions, and a function that makes features of their outputs."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.last, self.features = nn.ReLU(), nn.Linear(256, 2), features
        self.orders: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.second(self.relu(self.first(x))))
        self.orders.add(y.is_contiguous(memory_format=torch.channels_last))
        return self.last(self.features(y))  # type: ignore[no-any-return]


def net(features: Callable[[Tensor], Tensor] = lambda y: y.flatten(1)) -> Net:
    torch.manual_seed(0)
    return Net(features).eval()


@pytest.mark.parametrize(("features", "takes"), [
    (lambda y: y.flatten(1), True),
    (lambda y: y.view(len(y), -1), False),  # does not run
    (lambda y: y.as_strided((len(y), 256), (256, 1)), False),  # reads other elements
    (lambda y: y.flatten(1) + torch.rand(1), True),  # the same draws in both orders
    (lambda y: y.flatten(1) * torch.nan, False)])
def test_models_with_the_same_outputs_take_it(features: Callable[[Tensor], Tensor],
                                              takes: bool) -> None:
    model = net(features)
    before = torch.get_rng_state()
    assert takes_channels_last(model, X) is takes
    assert torch.equal(torch.get_rng_state(), before)
    assert model.first.weight.is_contiguous() and model.second.weight.is_contiguous()


def test_a_single_different_value_is_noticed() -> None:
    def swapped(y: Tensor) -> Tensor:
        out = y.flatten(1).clone()
        out[:, 0] += y.is_contiguous() * 0.01 * out.abs().amax()
        return out
    assert not takes_channels_last(net(swapped), X)


def test_quantized_models_take_it() -> None:
    model = convert(net(), 1)
    with torch.no_grad(), channels_last(model):
        order = model(X)
    assert takes_channels_last(model, X) and order.shape == (4, 2)


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), net().double(), net().bfloat16()])
def test_other_kinds_of_models(model: nn.Module) -> None:
    x = X.to(next(model.parameters()).dtype)
    assert takes_channels_last(model, x) is isinstance(model, Net)


def test_vectors_do_not_take_it() -> None:
    assert not takes_channels_last(nn.Sequential(nn.Linear(3, 2)), torch.rand(2, 3))


def test_a_compiled_model_is_not_compiled_again() -> None:
    inside = net()
    inside.compile(backend="eager")
    for model in (torch.compile(net(), backend="eager"), nn.Sequential(inside)):
        assert not takes_channels_last(model, X)


def stopped(model: nn.Module, orders: list[bool]) -> None:
    with channels_last(model):
        orders += [p.is_contiguous(memory_format=torch.channels_last)
                   for p in model.parameters() if p.dim() == 4]
        raise RuntimeError("stop")


def test_weights_are_restored_afterwards() -> None:
    model = net()
    orders: list[bool] = []
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="stop"):
        stopped(model, orders)
    assert orders == [True, True] and [p.data_ptr() for p in model.parameters()] == places
    order_weights(model, torch.channels_last)
    assert model.second.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_channel_and_1x1_kernels_follow_and_strides_are_restored() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1))
    strides, x = [p.stride() for p in model.parameters()], X[:, :1]
    order_weights(model, torch.channels_last)
    for y in (model[0](x), model(x)):
        assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    order_weights(model, torch.contiguous_format)
    assert [p.stride() for p in model.parameters()] == strides


def test_an_attack_uses_it_and_the_check_counts_no_queries() -> None:
    model = net()
    fmodel = FoolboxModel(PixelModel(model, Threat(eps=0.1)))
    places = [p.data_ptr() for p in model.parameters()]
    model.orders.clear()
    PGD("ce", 3).run(fmodel, X, fb.criteria.Misclassification(LABELS), epsilon=0.1)
    assert model.orders == {True, False} and fmodel.module.last is True
    first = fmodel.module.queries
    model.orders.clear()
    PGD("ce", 3).run(fmodel, X, fb.criteria.Misclassification(LABELS), epsilon=0.1)
    assert model.orders == {True} and fmodel.module.queries == 2 * first
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_model_that_does_not_take_it_is_attacked_unchanged() -> None:
    model = net(lambda y: y.view(len(y), -1))
    fmodel = FoolboxModel(model)
    found = PGD("ce", 3).run(fmodel, X, fb.criteria.Misclassification(LABELS), epsilon=0.1)
    assert fmodel.module.last is False and found.shape == X.shape
