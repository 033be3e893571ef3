"""Zoo models with unusual classes and names, and with operations that resemble activations."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import Case, Net, image, rows
from conversion_zoo.structure import Loops


class SubclassOfReLU(nn.ReLU):
    pass


class ScaledReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class OwnClasses(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = SubclassOfReLU(inplace=True), ScaledReLU(), Swish()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.a(h)
        return self.head(self.c(self.second(self.b(y - 0.2) + h)))


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SwishFunction.apply(x)


class OwnGradient(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = MemoryEfficientSwish()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.act(self.first(x)))))


class ForwardOfTheInstance(Net):
    """Model whose forward is an attribute of the instance, set in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.forward = self.deep

    def deep(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(F.relu(self.first(x)))))


class Delegates(nn.Module):
    """Wrapper that forwards missing attributes to the wrapped model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x)) + self.head(self.act(x))


class TakenNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.gelu_2 = nn.Linear(6, 6), "mine"
        self.register_buffer("relu_2", torch.ones(6))
        self.tanh = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.relu(x)) - self.relu_2
        h = F.gelu(F.gelu(self.first(h))).relu()
        return self.head(torch.tanh(self.tanh(self.second(h))))


class FreezesNorms(nn.Module):
    """Model whose BatchNorms stay in eval mode, with a frozen stem."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True)
        self.second, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.conv.requires_grad_(False)

    def train(self, mode: bool = True) -> FreezesNorms:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.act(self.norm(self.conv(x)))
        return self.head(F.relu6(self.second(x) + x[..., 1:-1, 1:-1]).mean((2, 3)))


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        nn.utils.parametrizations.weight_norm(self.first)
        nn.utils.parametrizations.spectral_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.tanh(self.second(self.act(self.first(x)))))



class LooksAlike(Net):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        x = torch.max(a, b) + a * (b > 0) + torch.where(a > 0, b, 0) + a.abs() + (a > 0) * 1.0
        return self.head(F.relu(x) + a.sign() * b.square().sqrt())


class GuardsDivision(Net):
    """Model that clamps a denominator, which is not a ReLU and must not be quantized."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and bool(x.detach().sum() > 1e6):
            return self.head(x)
        h = F.relu(self.first(x))
        h = h / h.norm(dim=1, keepdim=True).clamp(min=1e-6)
        variance = self.second(h).var(1, keepdim=True)
        return self.head(h / variance.clamp_min(1e-5).sqrt())


class Typed(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.head(torch.tanh(self.second(h)) + h * torch.sigmoid(h))


CASES: dict[str, Case] = {
    "own classes": Case(OwnClasses, "relu relu silu"),
    "autograd.Function": Case(OwnGradient, "relu silu"),
    "autograd.Function, learned": Case(OwnGradient, "relu silu", options={"dynamic": True}),
    "forward of the instance": Case(ForwardOfTheInstance, "gelu relu"),
    "__getattr__": Case(lambda: Delegates(Loops()), "gelu gelu gelu gelu relu"),
    "names taken": Case(TakenNames, "gelu gelu relu relu relu tanh"),
    "frozen norms, channels last": Case(FreezesNorms, "relu relu6", (), image),
    "parametrized": Case(Parametrized, "relu tanh", pickles=False),
    "looks alike": Case(LooksAlike, "relu"),
    "guards of a division": Case(functools.partial(GuardsDivision, False), "relu"),
    "guards of a division, not traceable": Case(functools.partial(GuardsDivision, True), "relu"),
    "chained": Case(Typed, "relu silu tanh"),
    "double": Case(lambda: Typed().double(), "relu silu tanh", (), lambda n: rows(n).double()),
    "bfloat16": Case(lambda: Typed().bfloat16(), "relu silu tanh", (),
                     lambda n: rows(n).bfloat16()),
}
