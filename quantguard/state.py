"""What a forward carries from one call to the next, and what it asks of the world outside.

A model that answers otherwise later must keep something meanwhile, or ask a clock. What its
modules hold, and what the Python functions of its forward get to see (arguments, closures, the
globals that they name), is compared by value between two calls on the same inputs.
"""

from __future__ import annotations

import collections
import contextvars
import datetime
import gc
import hashlib
import os
import random
import sys
import sysconfig
import threading
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SITES = {sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib")}
# Parts of the standard library that keep books of their own, which no answer depends on.
_BOOKS = {"logging", "threading", "_thread", "weakref", "_weakref", "abc", "_abc", "typing", "io",
          "_io", "inspect", "importlib", "_frozen_importlib", "_frozen_importlib_external",
          "warnings", "re", "unittest", "_pytest"}
# What notes the time, or looks for files, without any answer depending on it.
_LOGS = (_STDLIB + "logging" + os.sep, _STDLIB + "warnings.py", "<frozen importlib")
_DEEPEST = 40
# Functions of C that answer otherwise at another time, or for another caller.
_CLOCKS = {"time", "sys", "_thread", "posix", "nt", "_socket", "_ctypes", "_posixsubprocess"}
_HARMLESS = {"sleep", "get_ident", "get_native_id", "allocate_lock", "RLock", "fspath", "intern",
             "getsizeof", "exc_info"}
_ASKS = {("builtins", "id"), ("builtins", "input"), ("builtins", "globals"), ("io", "open"),
         ("_io", "open"), ("torch._C", "_to_dlpack"), ("torch._C", "_to_dlpack_versioned")}


_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class _Unreadable:
    """Say that what an object holds cannot be read: equal to nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def digest(x: Tensor) -> str:
    """Return a tensor's type, shape and bits."""
    kind = f"{x.dtype} {tuple(x.shape)}"
    if x.layout is not torch.strided or x.device.type == "meta" or type(x).__module__.startswith(
            "torch._subclasses"):
        return f"{kind} {x.layout}"
    with torch._C.DisableTorchFunction(), torch.no_grad():
        numbers = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        flat = numbers.detach().resolve_neg().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy()
        return f"{kind} {hashlib.sha256(data.data).hexdigest()}"


class _Walk:
    """Yield every value that is reached from one, as pairs of a path and what is there.

    Args:
        modules: ids of modules that count by their class alone: they are walked elsewhere.
        brief: whether tensors count by their shape alone: what a function is given stems from
            the images.
    """

    def __init__(self, modules: Collection[int] = (), brief: bool = False) -> None:
        self.modules, self.brief = modules, brief
        self.met: dict[int, int] = {}
        self.alive: list[Any] = []  # so that no other object gets its id

    def __call__(self, value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if isinstance(value, _Unreadable):
            yield path, value
            return
        if kind in _PLAIN or isinstance(value, np.generic):
            yield path, (kind.__name__, repr(value))
            return
        if id(value) in self.met or depth > _DEEPEST:
            yield path, ("again", self.met.get(id(value), kind.__qualname__))
            return
        self.met[id(value)] = len(self.met)
        self.alive.append(value)
        if isinstance(value, Tensor) and not self.brief:
            yield path, digest(value)
            for name, part in list(value.__dict__.items()):
                yield from self(part, f"{path}.{name}", depth + 1)
        elif isinstance(value, Tensor):
            yield path, f"{value.dtype} {value.dim()}"
        elif id(value) in self.modules:
            yield path, kind.__qualname__
        else:
            yield path, kind.__qualname__
            for name, part in self._parts(value):
                yield from self(part, f"{path}{name}", depth + 1)

    def _parts(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what an object holds, each with what its path goes on with."""
        kind = type(value)
        root = (getattr(kind, "__module__", None) or "").split(".")[0]
        if isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, dict):
            for number, (key, part) in enumerate(list(value.items())):
                name = repr(key) if isinstance(key, (str, int, float)) else f"key {number}"
                yield f"[{name}]", part
                if not isinstance(key, (str, int, float)):
                    yield f".keys[{number}]", key
            yield from self._attributes(value)
        elif isinstance(value, (list, tuple, collections.deque)):
            yield ".length", len(value)
            yield from ((f"[{i}]", part) for i, part in enumerate(list(value)))
            yield from self._attributes(value)
        elif isinstance(value, _PLAIN):  # a subclass
            base: Any = next(base for base in _PLAIN if isinstance(value, base))
            yield "", base(value)
            yield from self._attributes(value)
        elif isinstance(value, (set, frozenset)):
            yield "", sorted(repr(list(_Walk()(part, ""))) for part in list(value))
        elif isinstance(value, types.FunctionType):
            if not library(value.__code__.co_filename):
                yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from ((".__func__", value.__func__), (".__self__", value.__self__))
        elif isinstance(value, type):
            if root not in _BOOKS:
                yield from _class_data(value)
        elif isinstance(value, types.GeneratorType):
            if not self.brief and value.gi_frame is not None:  # an iterator in it is in no variable
                yield "", _Unreadable()
        elif isinstance(value, np.ndarray):
            yield ".bits", f"{value.dtype} {value.shape} {value.tobytes()!r}"
        elif isinstance(value, torch.Generator):
            yield ".state", digest(value.get_state())
        elif isinstance(value, np.random.Generator):
            yield ".state", value.bit_generator.state
        elif isinstance(value, np.random.RandomState):
            yield ".state", value.get_state()
        elif isinstance(value, random.Random):
            yield ".state", value.getstate()
        elif isinstance(value, contextvars.ContextVar):
            yield ".get()", value.get(None)
        elif isinstance(value, threading.local):
            yield "", vars(value)
        elif isinstance(value, types.BuiltinFunctionType) and value.__module__ == "time":
            if value.__name__ not in _HARMLESS:
                yield "", _Unreadable()
        elif hasattr(kind, "__next__"):
            yield ".state", _reduced(value, None if self.brief else _Unreadable())
        elif root in ("torch", "quantguard") or root in _BOOKS or isinstance(
                value, (types.ModuleType, types.BuiltinFunctionType)):
            return
        else:
            held = list(self._attributes(value))
            yield from held if held else [(".state", _reduced(value, None))]

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        yield from ((f".{n}", v) for n, v in list(getattr(value, "__dict__", {}).items()))
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    yield f".{name}", getattr(value, name)
        if not isinstance(value, tuple):  # of a NamedTuple, names of its parts
            yield from ((f".__class__{n}", v) for n, v in _class_data(type(value)))

    def _module(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, part in list(module.__dict__.items()):
            if name in ("_parameters", "_buffers", "_modules"):
                yield from ((f".{child}", v) for child, v in list(part.items()))
            else:
                yield f".{name}", part
        yield from ((f".__class__{n}", v) for n, v in _class_data(type(module)))

    def _function(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        yield from ((f".{n}", v) for n, v in list(function.__dict__.items()))
        yield from ((f".__defaults__[{i}]", v) for i, v in enumerate(function.__defaults__ or ()))
        yield from ((f".__kwdefaults__[{n}]", v)
                    for n, v in (function.__kwdefaults__ or {}).items())
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (),
                              strict=True):
            try:
                yield f".{name}", cell.cell_contents
            except ValueError:  # nothing in it yet
                continue


def _class_data(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what the user's own classes hold; their methods may hold something, too."""
    for base in cls.__mro__:
        if _foreign((base.__module__ or "").split(".")[0]):
            continue
        for name, part in list(vars(base).items()):
            if isinstance(part, (staticmethod, classmethod)):
                part = part.__func__
            if not (name.startswith("__") and name.endswith("__")) and not isinstance(
                    part, (property, types.MemberDescriptorType, types.GetSetDescriptorType)):
                yield f".{name}", part


def _foreign(root: str) -> bool:
    """Return whether the classes of a package are a library's that holds no state in them."""
    return root in ("torch", "quantguard", "numpy") or (
        root in sys.stdlib_module_names and root != "__main__")


def _reduced(value: Any, otherwise: Any) -> Any:
    """Return what pickle would make of an object that shows its state nowhere else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return value.__reduce_ex__(4)
    except Exception:  # whatever an object says that cannot be pickled
        return otherwise


def library(file: str) -> bool:
    """Return whether a file is torch's, ours or the standard library's, not the model's."""
    return file.startswith((_TORCH, _HERE)) or file.startswith("<frozen") or (
        file.startswith(_STDLIB) and not any(file.startswith(site) for site in _SITES))


@contextmanager
def profiled(note: Callable[[types.FrameType, str, Any], None]) -> Iterator[None]:
    """Call note for every function that is called inside, as ``sys.setprofile`` does."""
    collects, other = gc.isenabled(), sys.getprofile()
    gc.disable()  # what its callbacks do is not the forward's
    if other is None:  # another profiler's place is not taken
        sys.setprofile(note)
    try:
        yield
    finally:
        if other is None:
            sys.setprofile(None)
        if collects:
            gc.enable()


class _Calls:
    """Note what the functions of a forward get to see, and what they ask the world outside.

    Attributes:
        seen: for each call of a function, where it stands and what it sees.
        asked: what was asked of a clock, the system, or about the caller.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module) for module in model.modules()}
        self.seen: list[tuple[str, Any]] = []
        self.asked: list[str] = []
        self._known: set[tuple[types.CodeType, int]] = set()

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "c_call":
            self._ask(frame, arg)
        elif event == "call" and not library(code.co_filename):
            self._see(frame, code)

    def _ask(self, frame: types.FrameType, function: Any) -> None:
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        now = isinstance(owner, type) and issubclass(owner, datetime.date) \
            and name in ("now", "utcnow", "today")
        # copy.deepcopy asks for an id, too: only where the model itself does
        asks = (module, name) in _ASKS and not library(frame.f_code.co_filename)
        if not now and not asks and (module not in _CLOCKS or name in _HARMLESS):
            return
        caller: types.FrameType | None = frame
        while caller is not None and library(caller.f_code.co_filename) \
                and not caller.f_code.co_filename.startswith((_TORCH, _HERE)):
            if caller.f_code.co_filename.startswith(_LOGS):
                return
            caller = caller.f_back
        if caller is None or not library(caller.f_code.co_filename):
            self.asked.append(f"{module or type(owner).__name__}.{name}")

    def _see(self, frame: types.FrameType, code: types.CodeType) -> None:
        place = f"{code.co_name} at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        given, walk = frame.f_locals, _Walk(self.modules, brief=True)
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount
                                     + bool(code.co_flags & 4) + bool(code.co_flags & 8)]:
            if name in given and not name.startswith("."):
                self.seen += walk(given[name], f"{name} of {place}")
        wide = _Walk(self.modules)
        for name in code.co_freevars:
            if name in given and name != "__class__":  # that is for the super() of a method
                self.seen += wide(given[name], f"{name} of {place}")
        if (code, id(frame.f_globals)) in self._known:
            return
        self._known.add((code, id(frame.f_globals)))
        for name in code.co_names:
            for space in (frame.f_globals, frame.f_builtins):
                if name in space:
                    self._name(space[name], code.co_names, name, wide)
                    break

    def _name(self, value: Any, names: Sequence[str], path: str, walk: _Walk,
              depth: int = 0) -> None:
        """Walk a value that code names; of a module, and of a library's own, what it names there.
        """
        file = value.__code__.co_filename if isinstance(value, types.FunctionType) else ""
        root = (value.__module__ or "").split(".")[0] if isinstance(value, type) else ""
        if not isinstance(value, types.ModuleType) and not library(file) and not _foreign(root):
            self.seen += walk(value, path)
        elif depth < 3 and isinstance(getattr(value, "__dict__", None), Mapping):
            for name in names:
                if name in value.__dict__:
                    self._name(value.__dict__[name], names, f"{path}.{name}", walk, depth + 1)


def carried(model: nn.Module, call: Callable[[], Any]) -> str | None:
    """Return what a model carries from one call to another, or asks outside; None: nothing found.

    A cache that the first call fills is no state: the second call and the third are compared.

    Args:
        model: what is called.
        call: calls it once, always on the same inputs.

    Returns:
        One sentence, or None. Not found is what stands outside of the model's Python: in a thread
        that runs already, a file, a C extension, or what somebody else changes.
    """
    call()
    found: list[tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = []
    for _ in range(2):
        calls = _Calls(model)
        with profiled(calls):
            call()
        if calls.asked:
            return f"It calls {calls.asked[0]}, which may answer otherwise another time."
        found.append((list(_Walk()(model, "model")), calls.seen))
    for second, third in zip(*found, strict=True):
        for one, other in zip(second, third, strict=False):
            if one != other:
                return f"{one[0] if one[0] == other[0] else other[0]} changes from call to call, " \
                       "which a later answer may depend on."
        if len(second) != len(third):
            return "It keeps more from call to call, which a later answer may depend on."
    return None
