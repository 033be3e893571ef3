"""Small models for tests of rewritten modules, and the comparison with the float model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard.nn.contexts import backward, bypass, soften

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """Model that calls an activation of any form between two layers."""

    def __init__(self, call: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.call = call
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, self.first(x)))


def seeded(model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        result = model(*[a.clone() for a in arguments], **options)
    assert isinstance(result, Tensor)
    return result


def assert_converted(model: nn.Module, converted: nn.Module, x: Tensor = X) -> None:
    """Check in both modes that outputs and buffers are equal under bypass, and not outside it."""
    model, converted = copy.deepcopy(model), copy.deepcopy(converted)
    for training in (True, False):
        model.train(training)
        converted.train(training)
        with bypass(converted):
            assert torch.equal(seeded(converted, x), seeded(model, x))
        state = converted.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        if not training:
            assert not torch.equal(seeded(converted, x), seeded(model, x))


def same_gradients(model: nn.Module, converted: nn.Module, x: Tensor = X) -> bool:
    """Return whether bypass has the float model's gradients; check that surrogates are nonzero."""
    grads = []
    for net in (model, converted):
        leaf = x.clone().requires_grad_()
        with bypass(net):
            seeded(net, leaf).sum().backward()
        grads.append(leaf.grad)
    for context in (lambda: backward(converted, "ramp"), lambda: soften(converted, 4.0)):
        leaf = x.clone().requires_grad_()
        with context():
            seeded(converted, leaf).square().sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    return grads[0] is not None and torch.equal(*grads)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Repeats(nn.Module):
    """Model that calls one module three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.layer, self.head = nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layer(x))
        x = self.act(self.layer(x) - 0.5)
        return self.head(self.act(self.layer(x) + 0.25))


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Iterates(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Reaches(nn.Module):
    """Model that calls a grandchild, which its parent calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(nn.ReLU()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block.act(self.block(x) - 0.1))


def shared(kind: str) -> tuple[nn.Module, int]:
    """Return a model with several calls of one activation object, and their number."""
    torch.manual_seed(0)
    act, head = nn.ReLU(), nn.Linear(6, 3)
    if kind == "in one Sequential":
        return nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act, head), 2
    if kind == "in two blocks":
        return nn.Sequential(Block(act), Block(act), head), 2
    if kind == "iterated over":
        return Iterates(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), head), 2
    if kind == "shared and iterated over":
        return Iterates(nn.Linear(6, 6), act, nn.Linear(6, 6), act, head), 2
    if kind == "from above":
        return Reaches(), 2
    block = Block(act)
    assert kind == "a block used twice"
    return nn.Sequential(block, nn.Linear(6, 6), block, head), 1


SHARED = ["in one Sequential", "in two blocks", "iterated over", "shared and iterated over",
          "from above", "a block used twice"]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    assert isinstance(clone, nn.Module)
    return clone


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy, "pickle": saved, "twice": lambda m: saved(copy.deepcopy(saved(m)))}


class Modal(nn.Module):
    """Model whose dropout, batch norm, activation and output depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.layer(x)))
        x = F.dropout(x, 0.5, training=self.training)
        if self.training:
            x = F.gelu(self.drop(x)) + F.tanh(x)
        return self.head(x)


class Blocked(nn.Module):
    """Module with a no_grad block, which a generated forward cannot represent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.relu(self.layer(x))
        return x * scale
