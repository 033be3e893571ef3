"""Compare objects by value: a traversal of everything that is reachable from one object."""

from __future__ import annotations

import collections
import contextvars
import hashlib
import random
import sys
import threading
import types
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .source_location import library

# Built-in functions of the time and system modules whose result does not depend on the time, the
# machine or the caller.
HARMLESS_CALLS = {"sleep", "get_ident", "get_native_id", "allocate_lock", "RLock", "fspath",
                  "intern", "getsizeof", "exc_info"}
# Parts of the standard library with internal records that no result depends on.
_RECORD_KEEPERS = {"logging", "threading", "_thread", "weakref", "_weakref", "abc", "_abc",
                   "typing", "io", "_io", "inspect", "importlib", "_frozen_importlib",
                   "_frozen_importlib_external", "warnings", "re", "unittest", "_pytest"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_MAX_DEPTH = 40


class Unreadable:
    """Marker for an object whose content cannot be read. It equals nothing, not even itself."""

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
        vector = numbers.detach().resolve_neg().cpu().contiguous().reshape(-1)
        data = vector.view(torch.uint8).numpy()
        return f"{kind} {hashlib.sha256(data.data).hexdigest()}"


class StateTraversal:
    """Iterates over all values reachable from an object, as pairs of a path and a value.

    Values are given in a form that can be compared: text for numbers, a digest for tensors. An
    object that was visited before, by this or an earlier call, is only referred to.

    Args:
        modules: ids of modules that are compared elsewhere; only their class is given here.
        shapes_only: leave out the numbers of tensors, which depend on the images where the
            traversal starts at the arguments of a function.
    """

    def __init__(self, modules: Collection[int] = (), shapes_only: bool = False) -> None:
        self.modules, self.shapes_only = modules, shapes_only
        self.visited: dict[int, int] = {}
        self.references: list[Any] = []  # keeps the visited objects alive, so that ids are unique

    def __call__(self, value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if isinstance(value, Unreadable):
            yield path, value
            return
        if kind in _PLAIN or isinstance(value, np.generic):
            yield path, (kind.__name__, repr(value))
            return
        if id(value) in self.visited or depth > _MAX_DEPTH:
            yield path, ("again", self.visited.get(id(value), kind.__qualname__))
            return
        self.visited[id(value)] = len(self.visited)
        self.references.append(value)
        if isinstance(value, Tensor) and not self.shapes_only:
            yield path, digest(value)
            for name, child in list(value.__dict__.items()):
                yield from self(child, f"{path}.{name}", depth + 1)
        elif isinstance(value, Tensor):
            yield path, f"{value.dtype} {value.dim()}"
        elif id(value) in self.modules:
            yield path, kind.__qualname__
        else:
            yield path, kind.__qualname__
            for name, child in self._children(value):
                yield from self(child, f"{path}{name}", depth + 1)

    def _children(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield the values inside an object, each with its suffix of the path."""
        kind = type(value)
        root = (getattr(kind, "__module__", None) or "").split(".")[0]
        if isinstance(value, nn.Module):
            yield from self._module(value)
        elif isinstance(value, dict):
            for number, (key, child) in enumerate(list(value.items())):
                name = repr(key) if isinstance(key, (str, int, float)) else f"key {number}"
                yield f"[{name}]", child
                if not isinstance(key, (str, int, float)):
                    yield f".keys[{number}]", key
            yield from self._attributes(value)
        elif isinstance(value, (list, tuple, collections.deque)):
            yield ".length", len(value)
            yield from ((f"[{i}]", child) for i, child in enumerate(list(value)))
            yield from self._attributes(value)
        elif isinstance(value, _PLAIN):  # a subclass
            base: Any = next(base for base in _PLAIN if isinstance(value, base))
            yield "", base(value)
            yield from self._attributes(value)
        elif isinstance(value, (set, frozenset)):
            yield "", sorted(repr(list(StateTraversal()(child, ""))) for child in list(value))
        elif isinstance(value, types.FunctionType):
            if not library(value.__code__.co_filename):
                yield from self._function(value)
        elif isinstance(value, types.MethodType):
            yield from ((".__func__", value.__func__), (".__self__", value.__self__))
        elif isinstance(value, type):
            if root not in _RECORD_KEEPERS:
                yield from _class_data(value)
        elif isinstance(value, types.GeneratorType):
            # an iterator inside of it is in no variable that could be read
            if not self.shapes_only and value.gi_frame is not None:
                yield "", Unreadable()
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
            if value.__name__ not in HARMLESS_CALLS:
                yield "", Unreadable()
        elif hasattr(kind, "__next__"):
            yield ".state", _reduced(value, None if self.shapes_only else Unreadable())
        elif root in ("torch", "quantguard") or root in _RECORD_KEEPERS or isinstance(
                value, (types.ModuleType, types.BuiltinFunctionType)):
            return
        else:
            attributes = list(self._attributes(value))
            yield from attributes if attributes else [(".state", _reduced(value, None))]

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        yield from ((f".{n}", v) for n, v in list(getattr(value, "__dict__", {}).items()))
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    yield f".{name}", getattr(value, name)
        if not isinstance(value, tuple):  # the class data of a NamedTuple are its field names
            yield from ((f".__class__{n}", v) for n, v in _class_data(type(value)))

    def _module(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, value in list(module.__dict__.items()):
            if name in ("_parameters", "_buffers", "_modules"):
                yield from ((f".{child}", v) for child, v in list(value.items()))
            else:
                yield f".{name}", value
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
            except ValueError:  # an empty cell: the variable is not assigned yet
                continue


def is_library_package(root: str) -> bool:
    """Return whether a top-level package is a library whose classes have no state of their own."""
    return root in ("torch", "quantguard", "numpy") or (
        root in sys.stdlib_module_names and root != "__main__")


def _class_data(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the class attributes of a user's classes, and their methods, which may have state."""
    for base in cls.__mro__:
        if is_library_package((base.__module__ or "").split(".")[0]):
            continue
        for name, value in list(vars(base).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if not (name.startswith("__") and name.endswith("__")) and not isinstance(
                    value, (property, types.MemberDescriptorType, types.GetSetDescriptorType)):
                yield f".{name}", value


def _reduced(value: Any, otherwise: Any) -> Any:
    """Return the pickle form of an object without readable attributes, else ``otherwise``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return value.__reduce_ex__(4)
    except Exception:  # an object that cannot be pickled may raise anything
        return otherwise
