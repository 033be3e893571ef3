"""Float models with weights as after training, their conversions, and bit-for-bit comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from architecture_families import Build
from torch import Tensor, nn

from quantguard.conversion.converter import convert
from quantguard.nn.contexts import bypass


@dataclass(frozen=True)
class Pair:
    """A float model, its conversion, and the shape of one input."""

    model: nn.Module
    converted: nn.Module
    shape: tuple[int, ...]


def images(shape: tuple[int, ...], number: int) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def worn(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Give a model weights as after training.

    With zero heads, tiny layer scales or unfitted running statistics, all images would have the
    same output, so that errors in activations would not show.
    """
    for tensor in model.parameters():
        if bool((tensor == tensor.flatten()[:1]).all()):
            tensor.add_(torch.rand_like(tensor) * 0.2)
        elif tensor.dim() > 1 and float(tensor.std()) < 0.01:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images(shape, 8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def make_pair(build: Build, shape: tuple[int, ...]) -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = worn(build(), shape).eval()
    next(model.parameters()).requires_grad_(False)
    return Pair(model, convert(model, bits=2, example=images(shape, 1)), shape)


@contextmanager
def borrowed(*models: nn.Module) -> Iterator[None]:
    """Restore tensors and modes afterwards, which is cheaper than many copies."""
    before = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    try:
        yield
    finally:
        for model, state in zip(models, before, strict=True):
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(state[name])
            model.train().eval()  # some models clear their caches in train()


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output in order: some models return dicts, some tuples."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if part is not None for t in tensors(part)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def finite(values: list[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


class Condition(NamedTuple):
    """Mode, gradients, batch size and autocast of a run."""

    training: bool = False
    grad: bool = False
    number: int = 5
    autocast: bool = False


def run(model: nn.Module, x: Tensor, how: Condition) -> list[Tensor]:
    """Return outputs and, with grad, the gradients of input and parameters; dropout is seeded."""
    model.train(how.training)
    leaf = x.clone().requires_grad_(how.grad)
    with torch.random.fork_rng(), torch.set_grad_enabled(how.grad):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=how.autocast):
            output = tensors(model(leaf * 1))  # some networks overwrite their input
        if not how.grad:
            return output
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        loss = torch.stack([t.float().square().mean() for t in output]).sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(t.detach() for t in output), *(g for g in found if g is not None)]


def smallest_batch(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return 2 if a BatchNorm would get one value per channel, which it refuses, else 1."""
    try:
        with borrowed(model):
            run(model, images(shape, 1), Condition(training=True))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return 2
    return 1


# Modes alternate, since graphs, caches and statistics of one mode must not affect the other.
CONDITIONS = (
    Condition(number=1), Condition(training=True, grad=True), Condition(grad=True),
    Condition(training=True, number=1), Condition(autocast=True),
    Condition(training=True, grad=True, number=2, autocast=True), Condition())


def assert_identical(pair: Pair) -> None:
    """Check bypass: outputs, gradients and running statistics, bit for bit."""
    model, converted, shape = pair.model, pair.converted, pair.shape
    smallest = smallest_batch(model, shape)
    # torch's bfloat16 gradient of a Conv3d is not deterministic.
    unsteady = any(isinstance(m, nn.Conv3d) for m in model.modules())
    with borrowed(model, converted):
        for how in CONDITIONS:
            if how.training:
                how = how._replace(number=max(how.number, smallest))
            if how.autocast and unsteady:
                how = how._replace(grad=False)
            x = images(shape, how.number)
            expected = run(model, x, how)
            assert finite(expected)
            with bypass(converted):
                assert same(run(converted, x, how), expected), how
            state = converted.state_dict()
            assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), how


def step(model: nn.Module, x: Tensor) -> None:
    """Take one step of training."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    output = tensors(model.train()(x))
    torch.stack([t.square().mean() for t in output]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
