"""Pooling before the staircase: the same function, another gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard import convert
from quantguard.activation import QuantActivation, staircases
from quantguard.contexts import backward, bypass, soften
from quantguard.pooling import pools_first


class Net(nn.Module):
    """A convolution, an activation, a pool: as modules or as functions."""

    def __init__(self, pool: Any, activation: Any = None, dim: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.conv, self.activation = conv(1, 4, 3, padding=1), activation or nn.ReLU()
        self.pool, self.head = pool, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.activation(self.conv(x))).flatten(1))
        return out


POOLS = {
    "module": (nn.MaxPool2d(2), 2), "padded": (nn.MaxPool2d(3, 2, 1), 2),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), 2), "1d": (nn.MaxPool1d(2), 1),
    "3d": (nn.MaxPool3d(2), 3), "adaptive": (nn.AdaptiveMaxPool2d(3), 2),
    "function": (lambda x: F.max_pool2d(x, 2), 2), "torch": (lambda x: torch.max_pool2d(x, 2), 2),
    "keyword": (lambda x: F.max_pool2d(x, kernel_size=2, return_indices=False), 2)}


def example(dim: int) -> Tensor:
    return torch.randn(4, 1, *[7] * dim, generator=torch.Generator().manual_seed(0))


def made(pool: Any, dim: int, activation: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net, x = Net(pool, activation, dim), example(dim)
    net(x)
    return convert(net, 2, example=x, **options)


def input_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    return y.detach(), gradient


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU], ids=["relu", "gelu"])
@pytest.mark.parametrize("name", POOLS)
def test_the_function_is_the_same_and_the_gradient_is_that_of_the_pool_before(
        name: str, activation: type[nn.Module]) -> None:
    pool, dim = POOLS[name]
    net, x = made(pool, dim, activation()), example(dim)
    before = input_gradient(net, x)
    with pools_first(net):
        after = input_gradient(net, x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    q: Any = net.activation

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = net.conv(x)  # type: ignore[operator]
            z = z if q.absorbs else q.function(z)
            out: Tensor = net.head(q.quantized(pool(z)).flatten(1))  # type: ignore[operator]
            return out
    expected = input_gradient(ByHand(), x)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_mode_and_the_twin_keep_their_values(per_channel: bool) -> None:
    net, x = made(nn.MaxPool2d(2), 2, per_channel=per_channel, dynamic=True), example(2)
    for context in (bypass(net), backward(net, "ste"), backward(net, "sigmoid(8)")):
        with context:
            before = input_gradient(net, x)
            with pools_first(net):
                after = input_gradient(net, x)
        assert torch.equal(before[0], after[0])
    with soften(net, 4):  # without ties nothing changes, but for the order of rounding
        before = input_gradient(net, x)
        with pools_first(net):
            after = input_gradient(net, x)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two)


def test_what_is_no_pool_of_the_staircase_stays_as_it_is() -> None:
    def indices(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, return_indices=True)[0]

    def written(x: Tensor) -> Tensor:
        return F.max_pool2d(x.mul_(-1), 2)  # monotone no more

    def between(x: Tensor) -> Tensor:
        return F.max_pool2d(-x, 2)

    for pool in (indices, written, between, nn.AvgPool2d(2)):
        net, x = made(pool, 2), example(2)
        before = input_gradient(net, x)
        with pools_first(net):
            after = input_gradient(net, x)
        assert all(map(torch.equal, before, after))
    plain = Net(nn.MaxPool2d(2))
    plain(x)
    with pools_first(plain):
        assert input_gradient(plain, x)[0].shape == (4, 3)
    with torch.inference_mode(), pools_first(net):
        net(x)


def test_the_context_leaves_nothing_behind() -> None:
    net = made(nn.MaxPool2d(2), 2)
    with pytest.raises(ZeroDivisionError), pools_first(net):
        raise ZeroDivisionError
    assert [m._state.noted for m in staircases(net).values()] == [None]
    assert isinstance(net.activation, QuantActivation)
