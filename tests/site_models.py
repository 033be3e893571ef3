"""Small models for tests of activation sites, and short views of a plan."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from quantguard.conversion.sites import Plan


class Calls(nn.Module):
    """Model that calls an activation of any form between two layers."""

    def __init__(self, call: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.call = call
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, self.first(x)))


def names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


def reasons(plan: Plan) -> dict[str, str]:
    return {site.name: site.reason for site in plan.sites}


def bits(plan: Plan) -> dict[str, int]:
    return {site.name: site.spec.bits if site.spec else 32 for site in plan.sites}


def block(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), *last)


class Named(nn.Sequential):
    pass


def stack() -> nn.Sequential:
    return nn.Sequential(block(), Named(*block()), nn.Linear(6, 3))
