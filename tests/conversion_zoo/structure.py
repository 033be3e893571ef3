"""Zoo models with loops, shared modules, recursion and containers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import Block, Case, Net


class Loops(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x)) + 0.1
        return self.head(x)


class LoopsOpaque(Loops):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return super().forward(x)


class SharedActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.one, self.two = Block(self.act), Block(self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.two(self.one(x))))


class SharedBlock(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(nn.SiLU())
        self.alias = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.second(self.block(x))))


class CallsForward(Net):
    """Model that calls a child, its forward, and another method of it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        x = self.block.forward(self.second(x))
        return self.head(self.block.features(self.first(x)))


class CallsForwardOpaque(CallsForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) < 1e6 else self.head(x)


class Recurses(Net):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 0:
            return self.head(x)
        return self.forward(F.relu(self.first(x)) - 0.1, depth - 1)


class CallsItself(Net):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 0:
            return self.head(torch.tanh(x))
        return self(F.relu(self.first(x)) - 0.1, depth - 1)


class SuperForward(Loops):
    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(super().forward(F.relu(self.second(x)))) * 2


class Slices(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(),
                                  nn.Linear(6, 6), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[1](self.body[0](x))
        x = self.body[2:4](x)
        for layer in self.body[4:]:
            x = layer(x)
        return self.head(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ActsAfter(nn.Sequential):
    """Sequential with a function after its children, which iteration must not show."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self) > 2 and bool(x.detach().sum() > 1e6):
            return x
        return F.relu(super().forward(x))


class Iterates(Net):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = ActsAfter(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return self.head(self.body(x))


class IteratesOpaque(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) < 1e6 else self.head(x)


class Chooses(Net):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.Tanh()})
        self.name = name

    def forward(self, x: Tensor, other: str = "gelu") -> Tensor:
        return self.head(self.acts[other](self.second(self.acts[self.name](self.first(x)))))


class ChoosesTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Chooses("relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, other="tanh") + self.inner(x)



CASES: dict[str, Case] = {
    "loop over layers": Case(Loops, "gelu gelu gelu"),
    "loop over layers, not traceable": Case(LoopsOpaque, "gelu gelu gelu"),
    "activation shared by parents": Case(SharedActivation, "relu relu tanh tanh tanh"),
    "block called twice": Case(SharedBlock, "relu silu"),
    "child's forward and method": Case(CallsForward, "gelu gelu relu relu relu"),
    "child's forward, not traceable": Case(CallsForwardOpaque, "gelu gelu relu relu"),
    "self.forward": Case(Recurses, "relu"),
    "self(...)": Case(CallsItself, "relu tanh"),
    "super().forward": Case(SuperForward, "gelu gelu gelu relu tanh"),
    "slices of a Sequential": Case(Slices, "gelu relu tanh"),
    "subclass of Sequential": Case(lambda: Residual(
        nn.Linear(6, 6), nn.ReLU(), Residual(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)),
        "relu tanh"),
    "function around a Sequential": Case(
        lambda: Iterates(nn.Linear(6, 6), nn.Tanh()), "relu tanh tanh"),
    "function around a Sequential, not traceable": Case(
        lambda: Iterates(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "relu tanh tanh"),
    "iterated over, not traceable": Case(
        lambda: IteratesOpaque(nn.Linear(6, 6), nn.Tanh()), "relu tanh tanh"),
    "ModuleDict": Case(functools.partial(Chooses, "relu"), "gelu relu", ("tanh: never called",)),
    "ModuleDict by an argument": Case(ChoosesTwice, "gelu relu relu tanh"),
}
