"""A net whose forward is a function of the test, and whether it can be certified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantguard as qg

D = 8  # inputs
X = torch.rand(6, D, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A net with a forward from outside, which may use its layers and buffers."""

    def __init__(self, answer: Callable[[Any, Any], Any],
                 prepare: Callable[[Any], Any] = lambda _: None) -> None:
        super().__init__()
        self.head, self.other, self.body = nn.Linear(D, 3), nn.Linear(D, 3), nn.Linear(D, D)
        self.register_buffer("ones", torch.ones(3))
        self.register_buffer("twos", 2 * torch.ones(3))
        self.answer, self.n = answer, 0
        prepare(self)

    def forward(self, x: Any) -> Any:
        return self.answer(self, x)


def certified(model: nn.Module) -> bool:
    """Return whether a model with random weights gets a certificate for any of a few images."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    with torch.no_grad():
        labels = model.eval().head(X).argmax(1)  # type: ignore[operator]
    return bool(qg.certify(model, [(X, labels)], qg.Threat(eps=1e-3),
                           progress=False).correct.any())


def plain(answer: Callable[[Net, Any], Any]) -> Callable[[], nn.Module]:
    """Return a function that builds a net with this forward."""
    return lambda: Net(answer)
