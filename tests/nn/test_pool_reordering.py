"""Pooling before the quantizer: the same function, another gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pooling_nets import POOLS, Net, example, input_gradient, made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantguard.nn.contexts import backward, bypass, soften
from quantguard.nn.pool_reordering import pools_first
from quantguard.nn.quant_activation import QuantActivation, quantizers


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
def test_values_do_not_change_in_any_mode(per_channel: bool) -> None:
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


def test_pools_of_other_tensors_are_left_alone() -> None:
    def indices(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, return_indices=True)[0]

    def written(x: Tensor) -> Tensor:
        return F.max_pool2d(x.mul_(-1), 2)  # no longer monotone

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
    assert [m._state.override for m in quantizers(net).values()] == [None]
    assert isinstance(net.activation, QuantActivation)


def test_quantizers_in_a_checkpointed_block_are_left_alone() -> None:
    net, x = made(nn.MaxPool2d(2), 2), example(2)
    activation: Any = net.activation
    plain = net.pool

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = net.conv(x)  # type: ignore[operator]
            y: Any = checkpoint(lambda v: plain(activation(v)), z, use_reentrant=False)
            out: Tensor = net.head(y.flatten(1))  # type: ignore[operator]
            return out
    expected = input_gradient(Block(), x)
    with pools_first(block := nn.Sequential(Block(), activation)):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = block[0](leaf)
            (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
            assert torch.equal(y.detach(), expected[0]) and torch.equal(gradient, expected[1])
