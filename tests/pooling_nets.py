"""Nets with an activation in front of a max-pool, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard import convert


class Net(nn.Module):
    """Net of a convolution, an activation and a pool, as modules or as functions."""

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


def output_and_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    weights = [p for p in net.parameters() if p.requires_grad]
    y = net(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *weights])]
