"""A model whose output may change from call to call gets no certificate."""

from __future__ import annotations

import array
import builtins
import collections
import contextvars
import ctypes
import datetime
import functools
import inspect
import itertools
import os
import random
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from custom_forward import Net, certified, plain
from torch import Tensor, nn

import quantguard as qg

LATE = 60  # the number of the call with another output


def turned(n: int) -> float:
    """Return the sign of the output on call n."""
    return 1.0 if n % LATE else -1.0


COUNT, LISTED, NUMBERS = 0, [0], itertools.count(1)
SPACE, LOCAL = types.SimpleNamespace(n=0), threading.local()
VARIABLE = contextvars.ContextVar("VARIABLE", default=0)
GENERATOR = np.random.default_rng(0)


class Settings:
    n = 0

    @classmethod
    def count(cls) -> float:
        cls.n += 1
        return turned(cls.n)


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> float:
        self.n += 1
        return turned(self.n)


class Text(str):
    n = 0


class Turns(nn.Module):
    """A layer that negates its input on some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: Any) -> Any:
        self.n += 1
        return x * turned(self.n)


TEXT, OUTSIDE = Text("a"), Turns()


def counting(where: Any, name: str = "n") -> float:
    setattr(where, name, getattr(where, name, 0) + 1)
    return turned(getattr(where, name))


def global_number(m: Net, x: Any) -> Any:
    global COUNT
    COUNT += 1
    return m.head(x) * turned(COUNT)


def enclosed(kind: str) -> Callable[[Net, Any], Any]:
    number, numbers, layer = 0, [0], Turns()

    def by_number(m: Net, x: Any) -> Any:
        nonlocal number
        number += 1
        return m.head(x) * turned(number)

    def by_list(m: Net, x: Any) -> Any:
        numbers.append(0)
        return m.head(x) * turned(len(numbers))
    return {"number": by_number, "list": by_list, "module": lambda m, x: layer(m.head(x))}[kind]


def default(m: Net, x: Any, calls: list[int] = [0]) -> Any:  # noqa: B006 - the state
    calls.append(0)
    return m.head(x) * turned(len(calls))


def keyword_default(m: Net, x: Any, *, calls: dict[str, int] = {"n": 0}) -> Any:  # noqa: B006
    calls["n"] += 1
    return m.head(x) * turned(calls["n"])


def local_thread(m: Net, x: Any) -> Any:
    LOCAL.n = getattr(LOCAL, "n", 0) + 1
    return m.head(x) * turned(LOCAL.n)


def variable(m: Net, x: Any) -> Any:
    VARIABLE.set(VARIABLE.get() + 1)
    return m.head(x) * turned(VARIABLE.get())


def starts_a_thread(m: Net, x: Any) -> Any:
    thread = threading.Thread(target=time.sleep, args=(0,))
    thread.start()
    thread.join()
    return m.head(x)


def yielded() -> Any:
    yield from itertools.cycle([1.0] * (LATE - 1) + [-1.0])


YIELDED = yielded()


def stores_the_last_output(m: Net, x: Any) -> Any:
    y = m.head(x) + m.last.mean()
    if isinstance(y, Tensor):
        m.last = y.detach()
    return y


def attribute(make: Callable[[], Any], use: Callable[[Any], float]) -> Callable[[], nn.Module]:
    """Return a function that builds a net whose output depends on the state of an attribute."""
    return lambda: Net(lambda m, x: m.head(x) * use(m.state), lambda m: setattr(m, "state", make()))


def hooked() -> nn.Module:
    model, calls = Net(lambda m, x: m.head(x)), [0]

    def hook(_: nn.Module, args: Any, y: Any) -> Any:
        calls.append(0)
        return y * turned(len(calls))
    model.register_forward_hook(hook)
    return model


def appended(state: Any) -> float:
    state.append(0)
    return turned(len(state))


LATER: dict[str, Callable[[], nn.Module]] = {
    "attribute": plain(lambda m, x: m.head(x) * counting(m)),
    "child": lambda: Net(lambda m, x: m.turn(m.head(x)), lambda m: setattr(m, "turn", Turns())),
    "hidden child": lambda: Net(lambda m, x: m.turn[0](m.head(x)),
                                lambda m: m.__dict__.__setitem__("turn", [Turns()])),
    "nested list": attribute(lambda: {"a": [[]]}, lambda state: appended(state["a"][0])),
    "array": attribute(lambda: array.array("i"), appended),
    "bytearray": attribute(bytearray, appended),
    "deque": attribute(lambda: collections.deque([1.0] * (LATE - 1) + [-1.0]),
                       lambda state: state.rotate(1) or state[0]),
    "tensor": attribute(lambda: torch.zeros(()), lambda state: turned(int(state.add_(1)))),
    "tensor.data": attribute(lambda: torch.zeros(()),
                             lambda state: turned(int(state.data.add_(1)))),
    "buffer": plain(lambda m, x: m.head(x) * turned(int(m.twos.data.add_(1)[0]))),
    "weights drift": plain(lambda m, x: m.head(x) + 0 * float(m.head.weight.data.mul_(0.9)[0, 0])),
    "tensor's attribute": plain(lambda m, x: m.head(x) * counting(m.head.weight)),
    "object": attribute(Slotted, lambda state: state()),
    "bound method": attribute(lambda: Slotted().__call__, lambda state: state()),
    "partial": attribute(lambda: functools.partial(print, calls=[]),
                         lambda state: appended(state.keywords["calls"])),
    "C integer": attribute(lambda: ctypes.c_long(0), lambda state: counting(state, "value")),
    "count": attribute(lambda: itertools.count(1), lambda state: turned(next(state))),
    "cycle": attribute(lambda: itertools.cycle([1.0] * (LATE - 1) + [-1.0]), next),
    "iterator": attribute(lambda: iter([1.0] * 500), next),
    "generator": attribute(yielded, next),
    "Random": attribute(lambda: random.Random(0), lambda state: 1 - 2 * (state.random() > 0.98)),
    "default_rng": attribute(lambda: np.random.default_rng(0),
                             lambda state: 1 - 2 * (state.random() > 0.98)),
    "RandomState": attribute(lambda: np.random.RandomState(0),
                             lambda state: 1 - 2 * (state.rand() > 0.98)),
    "Generator": attribute(lambda: torch.Generator().manual_seed(0),
                           lambda state: 1 - 2 * (float(torch.rand((), generator=state)) > 0.98)),
    "random": plain(lambda m, x: m.head(x) * (1 - 2 * (random.random() > 0.98))),
    "the system's random": plain(lambda m, x: m.head(x) * (
        1 - 2 * (random.SystemRandom().random() > 0.9999))),
    "global number": plain(global_number),
    "global list": plain(lambda m, x: m.head(x) * appended(LISTED)),
    "global iterator": plain(lambda m, x: m.head(x) * turned(next(NUMBERS))),
    "global generator": plain(lambda m, x: m.head(x) * next(YIELDED)),
    "global default_rng": plain(lambda m, x: m.head(x) * (1 - 2 * (GENERATOR.random() > 0.98))),
    "namespace": plain(lambda m, x: m.head(x) * counting(SPACE)),
    "text": plain(lambda m, x: m.head(x) * counting(TEXT)),
    "another class": plain(lambda m, x: m.head(x) * Settings.count()),
    "its own class": plain(lambda m, x: m.head(x) * counting(type(m), "calls")),
    "a library's class": plain(lambda m, x: m.head(x) * counting(nn.Linear, "quantguard_n")),
    "a library's function": plain(lambda m, x: m.head(x) * (
        counting(F.relu, "quantguard_n") if F.relu.quantguard_n else 1)),
    "builtins": plain(lambda m, x: m.head(x) * (
        counting(builtins, "quantguard_n") if builtins.quantguard_n else 1)),
    "a function's attribute": plain(lambda m, x: m.head(x) * counting(turned)),
    "closure's number": plain(enclosed("number")),
    "closure's list": plain(enclosed("list")),
    "closure's module": plain(enclosed("module")),
    "global module": plain(lambda m, x: OUTSIDE(m.head(x))),
    "default": plain(default), "keyword's default": plain(keyword_default),
    "hook": hooked, "threading.local": plain(local_thread), "context variable": plain(variable),
    "the last answer": lambda: Net(stores_the_last_output,
                                   lambda m: setattr(m, "last", torch.zeros(2, 3))),
    "clock": plain(lambda m, x: m.head(x) * (1 if time.time() < 9e9 else -1)),
    "clock in a partial": attribute(lambda: functools.partial(time.time),
                                    lambda state: 1 if state() < 9e9 else -1),
    "clock in an iterator": plain(lambda m, x: m.head(x) * (
        1 if next(iter(time.perf_counter, None)) < 9e9 else -1)),
    "date": plain(lambda m, x: m.head(x) * (1 if datetime.date.today().year < 3000 else -1)),
    "now": plain(lambda m, x: m.head(x) * (1 if datetime.datetime.now().year < 3000 else -1)),
    "file": plain(lambda m, x: m.head(x) * (1 if os.path.exists(os.devnull) else -1)),
    "open": plain(lambda m, x: m.head(x) * _opened()),
    "environment": plain(lambda m, x: m.head(x) * _environment()),
    "id": plain(lambda m, x: m.head(x) * (1 if id(x) else -1)),
    "its caller": plain(lambda m, x: m.head(x) * len(sys._getframe(0).f_code.co_names[:1])),
    "the stack": plain(lambda m, x: m.head(x) * (1 if inspect.stack(0) else -1)),
    "recursion limit": plain(lambda m, x: m.head(x) * (1 if sys.getrecursionlimit() else -1)),
    "globals()": plain(lambda m, x: m.head(x) * (1 if globals() else -1)),
    "thread": plain(starts_a_thread),
}
F.relu.quantguard_n = builtins.quantguard_n = 1  # type: ignore[attr-defined]


def _opened() -> int:
    with open(os.devnull) as file:
        return 1 - len(file.read())


def _environment() -> float:
    os.environ["QUANTGUARD_N"] = str(int(os.environ.get("QUANTGUARD_N", "0")) + 1)
    return turned(int(os.environ["QUANTGUARD_N"]))


@pytest.mark.parametrize("case", LATER)
def test_a_model_with_state_has_no_certificate(
        case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTGUARD_N", "0")
    with pytest.raises(qg.ConversionError):
        certified(LATER[case]())


def test_the_state_is_named() -> None:
    with pytest.raises(qg.ConversionError, match=r"model\.turn\.n changes from call to call"):
        certified(LATER["child"]())
    with pytest.raises(qg.ConversionError, match=r"It calls time\.time"):
        certified(LATER["clock"]())
