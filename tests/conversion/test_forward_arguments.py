"""Forwards with optional arguments and unusual signatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import X, assert_converted, saved
from torch import Tensor, nn

from quantguard.conversion.converter import convert
from quantguard.nn.contexts import bypass


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: float = 1.0,
                flip: bool = False) -> Tensor:
        y = F.relu(self.layer(x)) * scale
        if skip is not None:
            y = y + skip
        return -y if flip else y


class Passes(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.block, self.head, self.names = Optional(), nn.Linear(6, 3), names

    def forward(self, x: Tensor) -> Tensor:
        values = {"skip": x, "scale": 2.0, "flip": True}
        return self.head(self.block(x, **{name: values[name] for name in self.names}))


@pytest.mark.parametrize("names", [(), ("skip",), ("scale",), ("flip",), ("skip", "flip")])
def test_optional_arguments_of_a_forward_may_be_passed_inside_the_model(
        names: tuple[str, ...]) -> None:
    model = Passes(*names)
    assert_converted(model, convert(model))


@pytest.mark.parametrize("arguments", [{}, {"scale": 3.0}, {"flip": True}, {"skip": X},
                                   {"skip": X, "scale": 0.5}])
def test_optional_arguments_of_a_forward_may_be_passed_by_the_caller(arguments: Any) -> None:
    model = nn.Sequential(Optional(), nn.Linear(6, 3))
    converted = convert(model)
    with bypass(converted):
        assert torch.equal(converted[0](X, **arguments), model[0](X, **arguments))
    assert not torch.equal(converted[0](X, **arguments), model[0](X, **arguments))


class TupleDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        return F.relu(self.layer(x)).reshape(-1, *size).flatten(1)


class Unconventional(nn.Module):
    def __init__(this) -> None:
        super().__init__()
        this.layer = nn.Linear(6, 6)

    def forward(this, x: Tensor, scale: float = 2.0) -> Tensor:
        return F.relu(this.layer(x)) * scale


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return F.relu(self.layer(x)) * scale


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, *, first: Tensor, second: Tensor) -> dict[str, Any]:
        return {"a": F.relu(self.layer(first)), "b": (second, [first])}


class UsesReturns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Returns()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(second=x + 1, first=x)
        return out["a"] + out["b"][0] * out["b"][1][0]


@pytest.mark.parametrize("kind", [TupleDefault, Unconventional, KeywordOnly, UsesReturns])
def test_unusual_signatures(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.Linear(6, 3))
    converted = convert(model)
    assert_converted(model, converted)
    assert_converted(model, saved(converted))
