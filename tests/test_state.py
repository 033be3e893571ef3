"""A model that is another one where it runs, or later, has no certificate; others keep theirs."""

from __future__ import annotations

import array
import builtins
import collections
import contextvars
import ctypes
import dataclasses
import datetime
import enum
import functools
import inspect
import itertools
import logging
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
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import quantguard as qg
from quantguard.state import carried

D, LATE = 8, 60  # inputs; the call that is answered otherwise
X = torch.rand(6, D, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
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
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    with torch.no_grad():
        labels = model.eval().head(X).argmax(1)  # type: ignore[operator]
    return bool(qg.certify(model, [(X, labels)], qg.Threat(eps=1e-3),
                           progress=False).correct.any())


def shown(x: Any) -> bool:
    """Return whether it is torch.fx that looks."""
    return isinstance(x, fx.Proxy)


def turned(n: int) -> float:
    return 1.0 if n % LATE else -1.0


# ---- another function where it runs ----

def halves(m: Net, x: Any) -> Any:
    return torch.cat([m.head(x), -m.head(x)], 1)


def swallowed(x: Any) -> float:
    try:
        return -1.0 if x.shape[0] >= 0 else 1.0
    except Exception:
        return 1.0


def read_inside(x: Any) -> bool:
    """Read values in what a torch function mode has called, where no mode is any more."""
    if has_torch_function_unary(x):
        return handle_torch_function(read_inside, (x,), x)  # type: ignore[no-any-return]
    return bool((x.numpy() > 0.999).any())


def applied(x: Tensor) -> bool:
    met: list[float] = []
    x.clone().apply_(lambda v: met.append(v) or v)
    return max(met) > 0.999


SHOWN: dict[str, Callable[[Net, Any], Any]] = {
    "number": lambda m, x: m.head(x) * (1.0 if shown(x) else -1.0),
    "integer": lambda m, x: m.head(x) * (1 if shown(x) else 2),
    "made tensor": lambda m, x: m.head(x) * (torch.ones(3) * (1 if shown(x) else -1)),
    "full": lambda m, x: m.head(x) * torch.full((3,), 1.0 if shown(x) else 0.5),
    "alpha=": lambda m, x: torch.add(m.head(x), m.ones, alpha=1 if shown(x) else -7),
    "clamp": lambda m, x: m.head(x).clamp(-9, 9.0 if shown(x) else 0.1),
    "buffer": lambda m, x: m.head(x) * (m.ones if shown(x) else m.twos),
    "parameter": lambda m, x: m.head(x) + (m.head.bias if shown(x) else m.other.bias),
    "layer": lambda m, x: (m.head if shown(x) else m.other)(x),
    "transposed": lambda m, x: m.head(x @ (m.body.weight if shown(x) else m.body.weight.t())),
    "index": lambda m, x: m.head(x)[:, [0, 1, 2] if shown(x) else [2, 1, 0]],
    "which result": lambda m, x: (m.head(x), m.other(x))[0 if shown(x) else 1],
    "which window": lambda m, x: halves(m, x)[:, slice(0, 3) if shown(x) else slice(3, 6)],
    "window later on": lambda m, x: (lambda y: 2 * (y[0] if shown(x) else y[1]))(
        halves(m, x).chunk(2, 1)),
    "type": lambda m, x: m.head(x) * (-1.0 if type(x) is Tensor else 1.0),
    "swallowed": lambda m, x: m.head(x) * swallowed(x),
    "is tracing": lambda m, x: m.head(x) * (
        1.0 if torch.fx._symbolic_trace.is_fx_symbolic_tracing() else -1.0),
    "gradients on": lambda m, x: m.head(x) * (
        -1.0 if torch.is_grad_enabled() and not shown(x) else 1.0),
    "a read inside": lambda m, x: -m.head(x) if not shown(x) and read_inside(x) else m.head(x),
    "apply_": lambda m, x: -m.head(x) if not shown(x) and applied(x) else m.head(x),
}


@pytest.mark.parametrize("what", SHOWN)
def test_what_is_shown_must_be_what_runs(what: str) -> None:
    with pytest.raises(qg.ConversionError):
        certified(Net(SHOWN[what]))


class Tame(Net):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        twin = Net(lambda m, x: m.head(x))
        twin.load_state_dict(self.state_dict())
        return twin


def test_a_copy_is_not_what_runs() -> None:
    with pytest.raises(qg.ConversionError):
        certified(Tame(lambda m, x: m.head(x) if shown(x) else
                       m.head(x) * (1 - 2 * (x[:, :1] > 0.999).float())))


# ---- another function later ----

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
    """Negate what it is given, on some calls."""

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


def default(m: Net, x: Any, met: list[int] = [0]) -> Any:  # noqa: B006 - that is the trick
    met.append(0)
    return m.head(x) * turned(len(met))


def keyword_default(m: Net, x: Any, *, met: dict[str, int] = {"n": 0}) -> Any:  # noqa: B006
    met["n"] += 1
    return m.head(x) * turned(met["n"])


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


def keeps_the_last(m: Net, x: Any) -> Any:
    y = m.head(x) + m.last.mean()
    if isinstance(y, Tensor):
        m.last = y.detach()
    return y


def attribute(make: Callable[[], Any], use: Callable[[Any], float]) -> Callable[[], nn.Module]:
    """Return what builds a net that keeps something in an attribute and answers by it."""
    return lambda: Net(lambda m, x: m.head(x) * use(m.kept), lambda m: setattr(m, "kept", make()))


def plain(answer: Callable[[Net, Any], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(answer)


def hooked() -> nn.Module:
    model, met = Net(lambda m, x: m.head(x)), [0]

    def hook(_: nn.Module, args: Any, y: Any) -> Any:
        met.append(0)
        return y * turned(len(met))
    model.register_forward_hook(hook)
    return model


def appended(kept: Any) -> float:
    kept.append(0)
    return turned(len(kept))


LATER: dict[str, Callable[[], nn.Module]] = {
    "attribute": plain(lambda m, x: m.head(x) * counting(m)),
    "child": lambda: Net(lambda m, x: m.turn(m.head(x)), lambda m: setattr(m, "turn", Turns())),
    "hidden child": lambda: Net(lambda m, x: m.turn[0](m.head(x)),
                                lambda m: m.__dict__.__setitem__("turn", [Turns()])),
    "nested list": attribute(lambda: {"a": [[]]}, lambda kept: appended(kept["a"][0])),
    "array": attribute(lambda: array.array("i"), appended),
    "bytearray": attribute(bytearray, appended),
    "deque": attribute(lambda: collections.deque([1.0] * (LATE - 1) + [-1.0]),
                       lambda kept: kept.rotate(1) or kept[0]),
    "tensor": attribute(lambda: torch.zeros(()), lambda kept: turned(int(kept.add_(1)))),
    "tensor.data": attribute(lambda: torch.zeros(()), lambda kept: turned(int(kept.data.add_(1)))),
    "buffer": plain(lambda m, x: m.head(x) * turned(int(m.twos.data.add_(1)[0]))),
    "weights drift": plain(lambda m, x: m.head(x) + 0 * float(m.head.weight.data.mul_(0.9)[0, 0])),
    "tensor's attribute": plain(lambda m, x: m.head(x) * counting(m.head.weight)),
    "object": attribute(Slotted, lambda kept: kept()),
    "bound method": attribute(lambda: Slotted().__call__, lambda kept: kept()),
    "partial": attribute(lambda: functools.partial(print, met=[]),
                         lambda kept: appended(kept.keywords["met"])),
    "C integer": attribute(lambda: ctypes.c_long(0), lambda kept: counting(kept, "value")),
    "count": attribute(lambda: itertools.count(1), lambda kept: turned(next(kept))),
    "cycle": attribute(lambda: itertools.cycle([1.0] * (LATE - 1) + [-1.0]), next),
    "iterator": attribute(lambda: iter([1.0] * 500), next),
    "generator": attribute(yielded, next),
    "Random": attribute(lambda: random.Random(0), lambda kept: 1 - 2 * (kept.random() > 0.98)),
    "default_rng": attribute(lambda: np.random.default_rng(0),
                             lambda kept: 1 - 2 * (kept.random() > 0.98)),
    "RandomState": attribute(lambda: np.random.RandomState(0),
                             lambda kept: 1 - 2 * (kept.rand() > 0.98)),
    "Generator": attribute(lambda: torch.Generator().manual_seed(0),
                           lambda kept: 1 - 2 * (float(torch.rand((), generator=kept)) > 0.98)),
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
    "the last answer": lambda: Net(keeps_the_last, lambda m: setattr(m, "last", torch.zeros(2, 3))),
    "clock": plain(lambda m, x: m.head(x) * (1 if time.time() < 9e9 else -1)),
    "clock in a partial": attribute(lambda: functools.partial(time.time),
                                    lambda kept: 1 if kept() < 9e9 else -1),
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


@pytest.mark.parametrize("what", LATER)
def test_what_may_answer_otherwise_later_has_no_certificate(
        what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTGUARD_N", "0")
    with pytest.raises(qg.ConversionError):
        certified(LATER[what]())


def test_what_changes_is_named() -> None:
    with pytest.raises(qg.ConversionError, match=r"model\.turn\.n changes from call to call"):
        certified(LATER["child"]())
    with pytest.raises(qg.ConversionError, match=r"It calls time\.time"):
        certified(LATER["clock"]())


# ---- what is no state ----

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
    if m.kept is None:
        m.kept = {"w": torch.ones(3)}
    return m.head(x) * m.kept["w"]


def keeps_features(m: Net, x: Any) -> Any:
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


STILL: dict[str, Callable[[], nn.Module]] = {
    "constants": plain(lambda m, x: m.head(x) * torch.ones(3) * SCALE),
    "cache": lambda: Net(cached, lambda m: setattr(m, "kept", None)),
    "table": plain(lambda m, x: m.head(x) * table(3)),
    "features": plain(keeps_features), "logs": plain(logs), "loops": plain(loops),
    "training": plain(counts_in_training), "no_grad": plain(without_gradients),
    "configuration": lambda: Net(lambda m, x: m.head(x) * m.config.scale,
                                 lambda m: setattr(m, "config", Config())),
    "defaults": lambda: Net(lambda m, x: m.head(x) * m.kept["a"], lambda m: setattr(
        m, "kept", collections.defaultdict(lambda: 2.0))),
    "in place": plain(lambda m, x: m.head(torch.relu_(m.body(x)).mul_(2))),
}


@pytest.mark.parametrize("what", STILL)
def test_what_is_no_state_is_certified(what: str) -> None:
    assert certified(STILL[what]())


@pytest.mark.parametrize("bits", [2, 4])
def test_a_converted_model_and_one_under_interception_are_still(bits: int) -> None:
    def opaque(m: Net, x: Any) -> Any:
        m.features = m.body(x)
        return m.head(torch.relu(m.features))
    for answer in (opaque, lambda m, x: m.head(F.silu(m.body(x)))):
        model = qg.convert(Net(answer).eval(), bits, data=[X])
        with torch.no_grad():
            assert carried(model, lambda model=model: model(X)) is None  # type: ignore[misc]
        assert certified(model)


def test_another_profiler_keeps_its_place() -> None:
    met: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        met.append(event)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with torch.no_grad():
            model = Net(lambda m, x: m.head(x)).eval()
            assert carried(model, lambda: model(X)) is None
        assert sys.getprofile() is note and met
    finally:
        sys.setprofile(before)
