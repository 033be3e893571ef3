"""Inspecting and converting do not change the user's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from site_models import names
from torch import Tensor, nn

from quantguard.conversion.converter import convert, inspect


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet18()


class Remembers(nn.Module):
    """Model whose forward changes its own buffers and attributes, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(6, 6), how
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.calls, self.seen, self.table = 0, [], {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.count.add_(1)
        elif self.how == "augmented":
            self.count += 1
        elif self.how == "constant":
            self.last = torch.ones(2)
        elif self.how == "value":
            self.last = x.detach().flatten()[:2]
        elif self.how == "number":
            self.calls += 1
        elif self.how == "list":
            self.seen.append(x)
        elif self.how == "dict":
            self.table["n"] += 1
        return F.relu(self.layer(x))


WAYS = ["in place", "augmented", "constant", "value", "number", "list", "dict"]


def snapshot(model: nn.Module) -> list[Any]:
    """Return the visible state of a model and the random state, comparable by ``==``."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    for path, module in model.named_modules():
        plain = {k: repr(v) for k, v in sorted(module.__dict__.items())
                 if not k.startswith("_")}
        tensors = {k: (type(v), v.tolist() if type(v) in (Tensor, nn.Parameter) else repr(v))
                   for place in (module._parameters, module._buffers) for k, v in place.items()}
        seen.append((path, type(module), plain, tensors, list(module._modules),
                     list(module.__dict__)))
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("verb", [inspect, convert])
def test_inspect_and_convert_do_not_change_the_users_model(
        verb: Callable[..., Any], how: str, training: bool) -> None:
    # Remembers may be untraceable; its sites then stay float and are listed.
    model = nn.Sequential(Remembers(how), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model.train(training)
    before = snapshot(model)
    verb(model, example=torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert snapshot(model) == before


@pytest.mark.parametrize("how", WAYS)
def test_the_snapshot_detects_each_of_these_changes(how: str) -> None:
    """Negative control: running the forward changes the snapshot."""
    model = nn.Sequential(Remembers(how), nn.Linear(6, 3))
    before = snapshot(model)
    model(torch.ones(1, 6))
    assert snapshot(model) != before


def test_a_resnet_is_not_changed(resnet: nn.Module) -> None:
    classes = [type(m) for m in resnet.modules()]
    attributes = [copy.copy(m.__dict__) for m in resnet.modules()]
    state = torch.get_rng_state()
    plan = inspect(resnet)
    assert [type(m) for m in resnet.modules()] == classes
    assert [m.__dict__ for m in resnet.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.sites[0].name == "relu" and plan.sites[1].name == "layer1.0.relu"
    assert names(plan)[2] == "layer1.0.relu_2"
