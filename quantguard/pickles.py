"""Read a pickle of ``torch.save`` through an allow-list: no code that the file brings is run."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import pickletools
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, BinaryIO

import torch
from torch import nn

from .blank import is_torchs
from .errors import LoadError

# What a pickle may name, and why that is safe. torch's weights-only reader calls any global on its
# list with any arguments (REDUCE), and a loaded model may hold one as `partial(f, "...")` and call
# it in its forward. So a global is safe only where *no* arguments make it do anything but compute:
# - nn.Module classes of the rooms below. Their constructors, forwards and __setstate__ build
#   modules and tensors; read and searched for calls that open, load, download, import, compile or
#   evaluate (torch 2.14, torchvision 0.29, timm 1.0.31): only FX's do, which turn names in the
#   model into Python source, and a __new__ or __setstate__ from outside torch.nn is not taken.
#   The rooms leave out torch.ao, torch.fx, torch.jit, torch.package, torch.nn.utils (makes classes)
#   and the rest of torch.nn.parallel (opens connections).
# - plain functions of torch.nn.functional, torch._C._nn and timm's activations: tensor in, tensor
#   out. Other functions of torchvision and timm are not: `resnet18(weights=...)` downloads.
# - Enums (a call is a look-up) except torchvision's weights, and configs: dataclasses without code
#   of their own for making or restoring them.
# - functools.partial, which calls nothing by itself and can only hold what is on this list.
# As a second wall, _check_calls lets the pickle's own opcodes call nothing of this list but partial
# and Enums: modules and configs are made blank (`cls.__new__(cls)`) and given their state, once.
_ROOMS = ("torch.nn.modules", "torch.nn.parallel.data_parallel", "torchvision.models",
          "torchvision.ops", "torchvision.transforms", "timm.models", "timm.layers")
_CODE_WRITERS = ("torchvision.models.feature_extraction", "timm.models._features_fx")
_FUNCTIONS = ("torch.nn.functional", "torch._C._nn", "timm.layers.activations",
              "timm.layers.activations_me")
# What travels with a model that quantguard hardened: two dataclasses of plain values.
_OURS = ("quantguard.metadata.ModelMetadata", "quantguard.spec.Threat")
# torch's own list has one member that calls what it is given.
_CALLER = "torch._tensor._rebuild_from_type_v2"
# Opcodes that only move plain values, among those that torch's reader takes.
_PLAIN = ("PROTO", "STOP", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT",
          "EMPTY_SET", "BINPERSID", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE",
          "SHORT_BINSTRING", "LONG1", "TUPLE1", "TUPLE2", "TUPLE3")


def read_pickle(file: BinaryIO, where: str, *, trust: bool = False, main: Any = None) -> object:
    """Read what ``torch.save`` wrote, importing only what the allow-list above takes.

    Args:
        file: an open, seekable binary file.
        where: its name, for errors.
        trust: import and run whatever the file asks for; also of a plain pickle.
        main: with trust, the module that has the classes which the file calls ``__main__.NAME``.

    Raises:
        LoadError: a damaged file, or one that names a global outside the allow-list.
    """
    start = file.read(14)
    file.seek(0)
    plain = start[:4] != b"PK\x03\x04" and start[:1] == b"\x80" and not is_torchs(start)
    if trust:
        with working_directory_importable():
            return _trusted(file, where, main, plain)
    if plain:
        raise _plain(file, where)
    names: list[str] = []
    if start[:4] == b"PK\x03\x04":
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            code = torch._C.PyTorchFileReader(file).get_record("data.pkl") if names else b""
        except Exception as error:  # whatever a hostile or damaged file makes the readers raise
            raise _unreadable(where, error) from error
        file.seek(0)
    elif not is_torchs(start):
        raise _unreadable(where, ValueError("neither a zip nor a pickle"))
    allowed = {name: _allowed(name) for name in names}
    refused = sorted(name for name, value in allowed.items() if value is None)
    if not refused and names:
        refused = _check_calls(code, allowed, where)
    if refused:
        raise _refusal(where, refused)
    # What the user registered is not among `names`, so leaving this context removes only ours.
    with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        return _torch_load(file, where)


def _inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def _allowed(path: str) -> Any:
    """Return the global that ``path`` names if the allow-list takes it, else None."""
    module, _, name = path.rpartition(".")
    if path == "functools.partial":
        return functools.partial
    if path in _OURS:
        return getattr(importlib.import_module(module), name)
    if not _inside(module, _ROOMS + _FUNCTIONS):
        return None
    try:
        value = vars(importlib.import_module(module)).get(name)
    except ImportError:
        return None
    # Judge by where a thing is defined, not by the module that it was re-exported from.
    home = getattr(value, "__module__", None) or ""
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value if home in _FUNCTIONS and not name.startswith("_") else None
    if not isinstance(value, type) or not _inside(home, _ROOMS) or _inside(home, _CODE_WRITERS):
        return None
    if issubclass(value, nn.Module):
        writes_code = issubclass(value, (torch.fx.GraphModule, torch.jit.ScriptModule))
        # torch.compile replaces nn.Module's own by a watched one.
        restores = value.__setstate__ is nn.Module.__setstate__ or \
            getattr(value.__setstate__, "__module__", "").startswith("torch.nn.modules.")
        return value if value.__new__ is object.__new__ and restores and not writes_code else None
    if issubclass(value, Enum):
        return None if hasattr(value, "get_state_dict") else value
    blank = value.__new__ is object.__new__ and not hasattr(value, "__setstate__")
    return value if is_dataclass(value) and blank else None


class _Global(str):
    """Stand for a global on the stack of `_check_calls`."""


def _check_calls(code: bytes, allowed: Mapping[str, Any], where: str) -> list[str]:
    """Follow a pickle's stack without running it; return the names that it calls and may not.

    Called may be what torch allows by itself, partial and Enums; other allowed classes are made
    without arguments and given a state once (a second could go to a ``__setstate__`` that the
    first one planted).
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    built: dict[int, Any] = {}
    refused: set[str] = set()
    empty = object()

    def may_call(value: Any) -> bool:
        if not isinstance(value, _Global) or value == _CALLER:
            return False
        target = allowed.get(value)
        return target is None or target is functools.partial or (
            isinstance(target, type) and issubclass(target, Enum))

    try:
        for opcode, argument, _ in pickletools.genops(code):
            op = opcode.name
            if op == "GLOBAL":
                # The reader renames Python 2's modules; none of those becomes one of `allowed`.
                module, name = str(argument).split(" ")
                stack.append(_Global(f"{module}.{name}"))
            elif op in ("BINPUT", "LONG_BINPUT"):
                memo[int(argument or 0)] = stack[-1]
            elif op in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument or 0)])
            elif op == "MARK":
                below.append(stack)
                stack = []
            elif op in ("TUPLE", "APPENDS", "SETITEMS"):
                stack = below.pop()
                if op == "TUPLE":
                    stack.append(object())
            elif op in ("REDUCE", "NEWOBJ"):
                arguments, target = stack.pop(), stack.pop()
                blank = op == "NEWOBJ" and isinstance(target, _Global) and arguments is empty
                if not blank and not may_call(target):
                    refused.add(str(target) if isinstance(target, _Global) else "(an object)")
                stack.append(object())
            elif op == "BUILD":
                stack.pop()
                if isinstance(stack[-1], _Global) or id(stack[-1]) in built:
                    refused.add("(an object that is given its state twice)")
                built[id(stack[-1])] = stack[-1]  # kept alive, so that its id stays its own
            elif op in ("APPEND", "SETITEM"):
                del stack[1 - len(opcode.stack_before):]
            elif op in _PLAIN:
                taken = len(opcode.stack_before)
                if taken > len(stack):
                    raise IndexError("stack underflow")
                del stack[len(stack) - taken:]
                stack += [empty if op == "EMPTY_TUPLE" else object() for _ in opcode.stack_after]
            else:
                raise ValueError(f"opcode {op}, which torch.save does not write")
    except (ValueError, IndexError, KeyError) as error:
        raise _unreadable(where, error) from error
    return sorted(refused)


def _trusted(file: BinaryIO, where: str, main: Any, plain: bool) -> object:
    """Read a file that is let do anything; what a script pickled of its own is found in main."""
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "__main__" and main is not None:
                return functools.reduce(getattr, name.split("."), main)
            return super().find_class(module, name)

    def load(source: Any, **options: Any) -> Any:
        return Unpickler(source, **options).load()

    reader: Any = types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="pickle")
    try:
        if plain:
            return load(file)
        return torch.load(file, map_location="cpu", pickle_module=reader, weights_only=False)
    except Exception as error:  # a damaged file raises anything
        if not isinstance(error, (ImportError, AttributeError)):
            raise _unreadable(where, error) from error
        fix = "Start where that module can be imported, or save the state dict and name the " \
              "model with --arch."
        if "__main__" in str(error):
            fix = "A script saved it, of a class of its own: say where that is, by --arch " \
                  "file.py:Class."
        elif main is not None:
            fix = f"The file was saved by a script, whose names are looked for in {main.__name__}."
        raise LoadError(f"{where} needs a class that is not here",
                        why=f"{type(error).__name__}: {error}", fix=fix) from error


def _plain(file: BinaryIO, where: str) -> LoadError:
    """Return the error for a pickle that torch did not write."""
    try:
        names = [str(a).replace(" ", ".") for op, a, _ in pickletools.genops(file)
                 if op.name == "GLOBAL"]
    except Exception as error:  # whatever a damaged file makes of it
        return _unreadable(where, error)
    asked = f" It asks for {', '.join(dict.fromkeys(names[:3]))}." if names else ""
    return LoadError(f"{where} was written by pickle, not by torch.save",
                     why=f"A pickle runs what it names. Nothing was run.{asked}",
                     fix="Name its model with --arch, and the weights alone are read; or write it "
                         "again: torch.save(model.state_dict(), FILE). If you trust the file, use "
                         "--trust (trust=True).")


def _torch_load(file: BinaryIO, where: str) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file raises anything
        text = str(error)
        found = (re.search(r"GLOBAL (\S+) was not an allowed global", text)
                 or re.search(r"unsupported GLOBAL (\S+) whose", text))
        if found and _allowed(found[1]) is not None:
            raise LoadError(f"{where} is a whole model in torch's old file format",
                            why="Of that format only weights can be read safely.",
                            fix="Name its model with --arch, and they are; or save it again with "
                                "torch 1.6 or later, or use --trust (trust=True) if you trust the "
                                "file.") from error
        if found:
            raise _refusal(where, [found[1]]) from error
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: BaseException) -> LoadError:
    reason = str(error).strip().partition("\n")[0]
    return LoadError(f"{where} cannot be read: it is damaged or was not written by torch.save",
                     why=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
                     fix="Copy it again, or write it anew: torch.save(model.state_dict(), FILE).")


def _refusal(where: str, names: list[str]) -> LoadError:
    compiled = any(name.startswith("torch._dynamo.") for name in names)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return LoadError(f"{where} is not loaded: it asks for {shown}",
                     why="A pickle can run code through what it names; only modules of torch.nn, "
                         "torchvision and timm are taken as harmless. Nothing was run.",
                     fix=("It is a torch.compile wrapper: save its _orig_mod. " if compiled else "")
                         + "Name its model with --arch, and the weights alone are read; if you "
                         "trust the file, use --trust (trust=True).")


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Import from the working directory, as ``python -m`` does and a console script does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
