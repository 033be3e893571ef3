"""A model without state is certified, whatever its forward does."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from custom_forward import Net, X, certified, plain
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.forward_state import carried


class Mode(enum.Enum):
    A = 1


@dataclasses.dataclass
class Config:
    scale: float = 2.0
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])
    mode: Mode = Mode.A


SCALE, LOG = 3.0, logging.getLogger(__name__)


@functools.lru_cache(None)
def table(n: int) -> Tensor:
    return torch.arange(n) + 1.0


def cached(m: Net, x: Any) -> Any:
    if m.table is None:
        m.table = {"w": torch.ones(3)}
    return m.head(x) * m.table["w"]


def stores_features(m: Net, x: Any) -> Any:
    m.features = m.body(x)
    m.shape = x.shape
    return m.head(torch.relu(m.features))


def logs(m: Net, x: Any) -> Any:
    LOG.warning("called")
    return m.head(x)


def counts_in_training(m: Net, x: Any) -> Any:
    if m.training and torch.is_grad_enabled():
        m.n += 1
    return m.head(x)


def loops(m: Net, x: Any) -> Any:
    for layer, _ in zip([m.body, m.body], range(2), strict=True):
        x = torch.relu(layer(x))
    return m.head(sum([x for _ in range(3)]))


def without_gradients(m: Net, x: Any) -> Any:
    with torch.no_grad():
        weights = torch.arange(3.0)
    return m.head(x) * weights


STATELESS: dict[str, Callable[[], nn.Module]] = {
    "constants": plain(lambda m, x: m.head(x) * torch.ones(3) * SCALE),
    "cache": lambda: Net(cached, lambda m: setattr(m, "table", None)),
    "table": plain(lambda m, x: m.head(x) * table(3)),
    "features": plain(stores_features), "logs": plain(logs), "loops": plain(loops),
    "training": plain(counts_in_training), "no_grad": plain(without_gradients),
    "configuration": lambda: Net(lambda m, x: m.head(x) * m.config.scale,
                                 lambda m: setattr(m, "config", Config())),
    "defaults": lambda: Net(lambda m, x: m.head(x) * m.table["a"], lambda m: setattr(
        m, "table", collections.defaultdict(lambda: 2.0))),
    "in place": plain(lambda m, x: m.head(torch.relu_(m.body(x)).mul_(2))),
}


@pytest.mark.parametrize("case", STATELESS)
def test_a_model_without_state_is_certified(case: str) -> None:
    assert certified(STATELESS[case]())


@pytest.mark.parametrize("bits", [2, 4])
def test_converted_and_intercepted_models_have_no_state(bits: int) -> None:
    def opaque(m: Net, x: Any) -> Any:
        m.features = m.body(x)
        return m.head(torch.relu(m.features))
    for answer in (opaque, lambda m, x: m.head(F.silu(m.body(x)))):
        model = qg.convert(Net(answer).eval(), bits, data=[X])
        with torch.no_grad():
            assert carried(model, lambda model=model: model(X)) is None  # type: ignore[misc]
        assert certified(model)


def test_another_profiler_is_not_replaced() -> None:
    events: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        events.append(event)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with torch.no_grad():
            model = Net(lambda m, x: m.head(x)).eval()
            assert carried(model, lambda: model(X)) is None
        assert sys.getprofile() is note and events
    finally:
        sys.setprofile(before)
