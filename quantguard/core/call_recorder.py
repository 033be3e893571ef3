"""Record the values that the functions of a forward can see, and their calls of the system."""

from __future__ import annotations

import datetime
import gc
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .object_state import HARMLESS_CALLS, StateTraversal, is_library_package
from .source_location import PACKAGE, STDLIB, TORCH, library

# Modules of C functions whose result depends on the time, the machine or the caller.
_CLOCKS = {"time", "sys", "_thread", "posix", "nt", "_socket", "_ctypes", "_posixsubprocess"}
_EXTERNAL = {("builtins", "id"), ("builtins", "input"), ("builtins", "globals"), ("io", "open"),
             ("_io", "open"), ("torch._C", "_to_dlpack"), ("torch._C", "_to_dlpack_versioned")}
# These read the time or look for files, and no result depends on it.
_LOGS = (STDLIB + "logging" + os.sep, STDLIB + "warnings.py", "<frozen importlib")


@contextmanager
def profiled(note: Callable[[types.FrameType, str, Any], None]) -> Iterator[None]:
    """Call ``note`` for every function call inside the context, as ``sys.setprofile`` does."""
    collects, other = gc.isenabled(), sys.getprofile()
    gc.disable()  # finalizers that happen to run now are not part of the forward
    if other is None:  # a profiler that is already installed stays
        sys.setprofile(note)
    try:
        yield
    finally:
        if other is None:
            sys.setprofile(None)
        if collects:
            gc.enable()


class CallRecorder:
    """Profiler callback that records the inputs of all functions a model's forward calls.

    Attributes:
        seen: pairs of a path and a value: the arguments, closures and globals of each function.
        external: names of called functions that read a clock, the system or the caller's frame.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module) for module in model.modules()}
        self.seen: list[tuple[str, Any]] = []
        self.external: list[str] = []
        self._known: set[tuple[types.CodeType, int]] = set()

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "c_call":
            self._record_external(frame, arg)
        elif event == "call" and not library(code.co_filename):
            self._record_inputs(frame, code)

    def _record_external(self, frame: types.FrameType, function: Any) -> None:
        module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        now = isinstance(owner, type) and issubclass(owner, datetime.date) \
            and name in ("now", "utcnow", "today")
        # copy.deepcopy calls id, too; only a call by the model itself counts
        asks = (module, name) in _EXTERNAL and not library(frame.f_code.co_filename)
        if not now and not asks and (module not in _CLOCKS or name in HARMLESS_CALLS):
            return
        caller: types.FrameType | None = frame
        while caller is not None and library(caller.f_code.co_filename) \
                and not caller.f_code.co_filename.startswith((TORCH, PACKAGE)):
            if caller.f_code.co_filename.startswith(_LOGS):
                return
            caller = caller.f_back
        if caller is None or not library(caller.f_code.co_filename):
            self.external.append(f"{module or type(owner).__name__}.{name}")

    def _record_inputs(self, frame: types.FrameType, code: types.CodeType) -> None:
        place = f"{code.co_name} at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        variables = frame.f_locals
        arguments = StateTraversal(self.modules, shapes_only=True)
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount
                                     + bool(code.co_flags & 4) + bool(code.co_flags & 8)]:
            if name in variables and not name.startswith("."):
                self.seen += arguments(variables[name], f"{name} of {place}")
        outside = StateTraversal(self.modules)
        for name in code.co_freevars:
            if name in variables and name != "__class__":  # the cell that super() reads
                self.seen += outside(variables[name], f"{name} of {place}")
        if (code, id(frame.f_globals)) in self._known:
            return
        self._known.add((code, id(frame.f_globals)))
        for name in code.co_names:
            for space in (frame.f_globals, frame.f_builtins):
                if name in space:
                    self._record_global(space[name], code.co_names, name, outside)
                    break

    def _record_global(self, value: Any, names: Sequence[str], path: str,
                       traversal: StateTraversal, depth: int = 0) -> None:
        """Record a global that code names; of a module or a library's object, the names in it."""
        file = value.__code__.co_filename if isinstance(value, types.FunctionType) else ""
        root = (value.__module__ or "").split(".")[0] if isinstance(value, type) else ""
        if not isinstance(value, types.ModuleType) and not library(file) \
                and not is_library_package(root):
            self.seen += traversal(value, path)
        elif depth < 3 and isinstance(getattr(value, "__dict__", None), Mapping):
            for name in names:
                if name in value.__dict__:
                    self._record_global(value.__dict__[name], names, f"{path}.{name}", traversal,
                                        depth + 1)
