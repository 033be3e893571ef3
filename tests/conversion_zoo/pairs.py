"""Pairs of a float model and its conversion, made once for all checks."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.table import ZOO
from quantguard.conversion.converter import conversion_of, convert

BITS = 2


class Pair(NamedTuple):
    """A float model, its visible state before conversion, and its conversion."""

    model: nn.Module
    before: Any
    converted: nn.Module


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def seen(model: nn.Module) -> list[Any]:
    """Return the visible state of a model, comparable by ``==``."""
    found: list[Any] = []
    for path, module in model.named_modules():
        own = {k: copy.copy(v) if isinstance(v, (dict, list)) else id(v)
               for k, v in vars(module).items()}
        parts = {k: [(n, id(v)) for n, v in own.pop(k).items()]
                 for k in ("_parameters", "_buffers", "_modules")}
        state = [(t.dtype, t.requires_grad, t._version, t.grad is None, t.detach().tolist())
                 for t in (*module.parameters(False), *module.buffers(False))]
        found.append((path, type(module), own, parts, state))
    return found


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """Seed all random number generators inside the context, and restore them afterwards."""
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        # torch.manual_seed would also queue a call for the GPU, which these tests do not use.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        numpy.random.set_state(before[2])


def pair_of(make: Callable[[], nn.Module], example: Any, **options: Any) -> Pair:
    """Make a model and convert it, with the same random numbers every time."""
    with seeded_random(0):
        model = make()
        before = seen(model)
        return Pair(model, before, convert(model, bits=BITS, example=example, **options))


@functools.cache
def pair_or_error(name: str) -> Pair | Exception:
    case = ZOO[name]
    try:
        return pair_of(case.make, case.inputs(5), **case.options)
    except Exception as error:  # raised again by each check
        return error


def converted_pair(name: str) -> Pair:
    """Return the pair of a zoo model, converted once; checks work on copies."""
    pair = pair_or_error(name)
    if isinstance(pair, Exception):
        raise pair
    return pair


def copy_of(model: nn.Module, training: bool) -> nn.Module:
    """Return a copy of a model in a mode; for speed it shares the record of its conversion."""
    done = conversion_of(model)
    return copy.deepcopy(model, {id(done): done} if done is not None else {}).train(training)


def converted_copy(name: str) -> nn.Module:
    return copy_of(converted_pair(name).converted, True)
