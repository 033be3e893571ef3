"""Zoo models that work in place, and that reach activation functions in unusual ways."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import Case, Net


class InPlaceThenRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = F.relu_(h)
        return self.head(y) + self.head(self.second(h))


class InPlaceModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Hardswish(True))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.body(h)
        return self.head(h + y)


class InPlaceViews(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :3].relu_()
        y = torch.tanh_(self.second(h))
        z = self.first(y)
        F.leaky_relu_(z.view(-1), 0.1)
        return self.head(z)


class Overwrites(nn.Module):
    """Module that overwrites its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(min=0) * 2


class OverwritesInput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = Overwrites()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.block(h)
        return self.head(y) - self.second(h)[:, :3]


class OverwritesOpaque(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if bool(h.detach().mean() > 100):
            return self.head(h)
        y = F.relu(h, inplace=True)
        z = torch.tanh_(self.second(h))
        return self.head(y + z + h)



class FunctionAttribute(Net):
    def __init__(self, act: Callable[..., Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))))


class LambdaOfTheClass(FunctionAttribute):
    act = staticmethod(lambda x: F.relu(x - 0.1))

    def __init__(self) -> None:
        Net.__init__(self)


class ListOfFunctions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.acts = [F.relu, torch.tanh, F.relu]

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip([self.first, self.second, self.head], self.acts, strict=True):
            x = layer(act(x))
        return x


def helper(x: Tensor, depth: int) -> Tensor:
    x = F.relu(x) - 0.1
    if depth:
        x = other_helper(x, depth)
    return F.relu(x)


def other_helper(x: Tensor, depth: int) -> Tensor:
    return torch.tanh(helper(x, depth - 1) * 2)


class Helpers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(helper(self.second(helper(self.first(x), 0)), 1))


class HelpersOpaque(Helpers):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.detach().sum() > 1e6):
            return self.head(x)
        return super().forward(x)


class Closures(Net):
    def forward(self, x: Tensor) -> Tensor:
        def act(y: Tensor, shift: float) -> Tensor:
            return F.gelu(y + shift)

        both = [F.relu(layer(x)) for layer in (self.first, self.second)]
        total = sum(act(y, shift) for shift, y in enumerate(both))
        return self.head((lambda y: y.tanh())(total))


class ClosuresOpaque(Closures):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Applies(nn.Module):
    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(x)


class FunctionArgument(Net):
    """Model that passes the function to a block, whose own graph cannot name it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Applies()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.second(self.block(self.first(x), F.relu)), F.gelu))


class DefaultFunction(Net):
    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        return self.head(act(self.first(x)))


class MaybeFunction(nn.Module):
    def forward(self, x: Tensor, act: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return (F.relu if act is None else act)(x)


class MaybeFunctions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = MaybeFunction()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.second(self.block(self.first(x))), torch.tanh))



CASES: dict[str, Case] = {
    "in place, then read": Case(InPlaceThenRead, "relu"),
    "in-place module on a tensor read later": Case(InPlaceModule, "hardswish relu"),
    "in place on views": Case(InPlaceViews, "leaky_relu relu tanh"),
    "in place on an argument": Case(OverwritesInput, "relu"),
    "in place, not traceable": Case(OverwritesOpaque, "relu tanh"),
    "function attribute": Case(functools.partial(FunctionAttribute, F.relu), "relu relu"),
    "partial attribute": Case(functools.partial(
        FunctionAttribute, functools.partial(F.leaky_relu, negative_slope=0.3)),
        "leaky_relu leaky_relu"),
    "builtin attribute": Case(functools.partial(FunctionAttribute, torch.tanh), "tanh tanh"),
    "lambda attribute": Case(lambda: FunctionAttribute(lambda x: F.gelu(x)), "gelu gelu",
                             pickles=False),
    "lambda of the class": Case(LambdaOfTheClass, "relu relu"),
    "list of functions": Case(ListOfFunctions, "relu relu tanh"),
    "helpers": Case(Helpers, "relu relu relu relu relu relu tanh"),
    "helpers, not traceable": Case(HelpersOpaque, "relu relu relu relu relu relu tanh"),
    "closures": Case(Closures, "gelu gelu relu relu tanh"),
    "closures, not traceable": Case(ClosuresOpaque, "gelu gelu relu relu tanh"),
    "function as an argument": Case(FunctionArgument, "gelu relu"),
    "function as a default": Case(DefaultFunction, "relu"),
    "function as an optional argument": Case(MaybeFunctions, "relu tanh"),
}
