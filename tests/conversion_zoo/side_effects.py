"""Zoo models with random numbers, contexts, checkpoints, and forwards that store values."""

from __future__ import annotations

import functools
import random

import numpy
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import AGAIN, Block, Case, Net


class DropsPath(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        if self.training and torch.rand(()) < 0.5:
            return self.head(h)
        return self.head(h + torch.tanh(self.second(h)))


class DropsRows(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        mask = h.new_empty(h.shape[0], 1).bernoulli_(0.5)
        h = F.dropout(h + mask * torch.rand_like(h), 0.3)
        return self.head(F.alpha_dropout(h.relu(), 0.2, training=self.training))


class PythonCoin(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.head(h if random.random() < 0.48 else torch.tanh(self.second(h)))


class NumpyCoin(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.head(h if numpy.random.rand() < 0.5 else torch.tanh(self.second(h)))


class NoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.relu(self.second(x))
            with torch.enable_grad():
                y = torch.tanh(self.first(x))
        return self.head(y * scale + F.gelu(x.detach()))


class GradSwitch(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            h = F.relu(self.first(x))
        return self.head(F.silu(self.second(h)))


class DecoratedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    @torch.no_grad()
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return F.relu(self.layer(x)) * scale


class Decorated(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = DecoratedBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) + self.block(x, 3.0))


class Autocasts(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.relu(self.first(x))
            h = torch.tanh(self.second(h))
        return self.head(F.silu(h.float() - 0.5))


class SetsAttributes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = F.relu(self.first(x))
        self.seen.append(tuple(x.shape))
        self.mean = 0.9 * self.mean + 0.1 * self.last.detach().mean(0)
        return self.head(torch.tanh(self.second(self.last - self.mean)) * self.calls)


class MakesTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        more = torch.ones(6, dtype=weight.dtype, device=weight.device)
        return self.head(F.relu(self.first(x)) + more)


class CountsInABuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        h = F.relu(self.first(x)) * self.count.clone()
        self.count += 1
        return self.head(h) + self.count.clone()


class Checkpoints(Net):
    """Model with checkpoints of a method, a module and a Sequential."""

    def __init__(self, use_reentrant: bool, opaque: bool) -> None:
        super().__init__()
        self.use_reentrant, self.opaque = use_reentrant, opaque
        self.block = Block(nn.GELU())
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.SiLU())

    def again(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(F.dropout(F.relu(self.first(x)), 0.2, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and bool(x.detach().sum() > 1e6):
            return self.head(x)
        options = {"use_reentrant": self.use_reentrant}
        x = torch.utils.checkpoint.checkpoint(self.again, x, **options)
        x = torch.utils.checkpoint.checkpoint(self.block, x, **options)
        x = torch.utils.checkpoint.checkpoint_sequential(self.body, 2, x, **options)
        return self.head(F.leaky_relu(x, 0.3))



CASES: dict[str, Case] = {
    "stochastic depth": Case(DropsPath, "relu tanh"),
    "random masks": Case(DropsRows, "gelu relu"),
    "python's coin": Case(PythonCoin, "relu tanh"),
    "numpy's coin": Case(NumpyCoin, "relu tanh"),
    "no_grad": Case(NoGrad, "gelu relu tanh"),
    "set_grad_enabled": Case(GradSwitch, "relu silu"),
    "decorated forward": Case(Decorated, "relu tanh"),
    "autocast": Case(Autocasts, "relu silu tanh"),
    "sets attributes": Case(SetsAttributes, "relu tanh"),
    "makes tensors": Case(MakesTensors, "relu"),
    "counts in a buffer": Case(CountsInABuffer, "relu"),
    "checkpoints": Case(functools.partial(Checkpoints, False, False),
                        "gelu leaky_relu relu relu relu silu tanh"),
    "reentrant checkpoints": Case(functools.partial(Checkpoints, True, False),
                                  "gelu leaky_relu relu relu relu silu tanh"),
    "checkpoints, not traceable": Case(
        functools.partial(Checkpoints, False, True), "gelu leaky_relu relu relu silu",
        (f"relu: {AGAIN}", f"tanh: {AGAIN}")),
    "reentrant checkpoints, not traceable": Case(
        functools.partial(Checkpoints, True, True), "gelu leaky_relu relu relu silu",
        (f"relu: {AGAIN}", f"tanh: {AGAIN}")),
}
