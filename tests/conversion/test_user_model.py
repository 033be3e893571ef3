"""Conversion preserves hooks, tied weights, modes and buffers, and the caller's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import COPIES, Calls, Modal, Repeats, X, assert_converted, seeded
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.core.module_utils import duplicate


def fired(model: nn.Module, log: list[str]) -> list[str]:
    log.clear()
    seeded(model, X.clone().requires_grad_()).sum().backward()
    return list(log)


def add_hooks(module: nn.Module, log: list[str]) -> None:
    module.register_forward_pre_hook(lambda m, a: log.append("before"))
    module.register_forward_hook(lambda m, a, y: log.append("after"))
    module.register_forward_pre_hook(lambda m, a, k: log.append("before with keywords"),
                                     with_kwargs=True)
    module.register_forward_hook(lambda m, a, k, y: log.append("after with keywords"),
                                 with_kwargs=True)
    module.register_full_backward_hook(lambda m, g, h: log.append("backward"))
    module.register_full_backward_pre_hook(lambda m, g: log.append("backward before"))


@pytest.mark.parametrize("where", ["1", "0", "0.act", ""])
def test_hooks_are_preserved(where: str) -> None:
    """Hooks are on a replaced activation, a rewritten module, a repeated module or the model."""
    log: list[str] = []
    model = nn.Sequential(nn.Sequential(), nn.ReLU(), nn.Linear(6, 3))
    model[0] = Residual()
    add_hooks(model.get_submodule(where), log)
    expected = fired(model, log)
    assert len(set(expected)) == 6
    converted = convert(model)
    assert fired(converted, log) == expected
    assert fired(restore(converted), log) == expected


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = nn.GELU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(self.act(self.layer(self.act(x))))) + F.relu(x)


def test_a_hook_that_changes_values_still_does() -> None:
    model = Calls(lambda self, x: self.act(x), nn.ReLU())
    model.act.register_forward_hook(lambda m, a, y: y + 1)
    assert_converted(model, convert(model))


@pytest.mark.parametrize("how", [lambda m: m, *COPIES.values()], ids=["convert", *COPIES])
def test_tied_weights_stay_tied(how: Callable[[nn.Module], nn.Module]) -> None:
    class Tied(Repeats):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 6)
            self.other.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.other(x))

    globals()["Tied"], Tied.__qualname__ = Tied, "Tied"  # pickle finds it by name
    model = Tied()
    clone = how(convert(model))
    assert clone.other.weight is clone.layer.weight
    assert clone.layer.weight is not model.layer.weight
    assert restore(clone).other.weight is not restore(clone).layer.bias
    back = restore(clone)
    assert back.other.weight is back.layer.weight


def test_the_mode_of_each_module_is_preserved() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), Modal()).train()
    model[1].eval()
    model[2].eval()
    before = {n: m.training for n, m in model.named_modules()}
    converted = convert(model)
    after = {n: m.training for n, m in converted.named_modules()}
    assert {n: after[n] for n in before} == before
    assert {n: m.training for n, m in model.named_modules()} == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data", [None, [X[:5], X[5:]]])
def test_the_callers_model_is_untouched(data: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), Modal())
    model.train(training)
    model[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    random, text = torch.get_rng_state(), repr(model)
    converted = convert(model, 2, True, data=data)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()] == seen
    assert repr(model) == text and not any(p.grad is not None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not converted[0].weight.requires_grad


def test_a_module_that_counts_its_calls_in_a_buffer_still_does() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return F.relu(self.layer(x)) * self.count

    model = nn.Sequential(Counts(), nn.Linear(6, 3))
    converted = convert(model)
    assert float(model[0].count) == float(converted[0].count) == 0
    converted(X)
    converted(X)
    assert float(converted[0].count) == 2


def test_data_parallel_is_removed() -> None:
    model = Repeats()
    converted = convert(nn.DataParallel(model))
    assert isinstance(converted, Repeats)
    assert_converted(model, converted)
    wrapped = nn.DataParallel(converted)
    assert conversion_of(wrapped) is conversion_of(converted)
    assert isinstance(restore(wrapped), Repeats)


def test_a_copy_is_equal_and_shares_no_memory() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    net[1].weight = net[0].weight
    net[1].bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    clone = duplicate(net)
    assert clone[0].weight is clone[1].weight is not net[0].weight
    assert [p.requires_grad for p in clone.parameters()] == [True, True, False, True, True]
    for (name, one), (again, other) in zip(net.state_dict().items(), clone.state_dict().items(),
                                           strict=True):
        assert name == again and torch.equal(one, other) and one.stride() == other.stride()
        assert one.data_ptr() != other.data_ptr()
