"""MODEL -> nn.Module: a file or an arch spec. Reading a file never runs code that it brings."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .errors import LoadError

MODEL_HELP = "a file, torchvision:NAME, timm:NAME or package.module:factory"

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
# torch's own list has one member that calls what it is given.
_CALLER = "torch._tensor._rebuild_from_type_v2"
# Opcodes that only move plain values, among those that torch's reader takes.
_PLAIN = ("PROTO", "STOP", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT",
          "EMPTY_SET", "BINPERSID", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE",
          "SHORT_BINSTRING", "LONG1", "TUPLE1", "TUPLE2", "TUPLE3")
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")


def is_arch_spec(model: str) -> bool:
    """Tell whether ``model`` is an arch spec: it has a colon and no such file exists."""
    return ":" in model and not os.path.exists(model)


def is_our_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a zip in quantguard's own format (it holds a manifest.json)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "manifest.json" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def build_arch(spec: str) -> nn.Module:
    """Build the untrained model that an arch spec names; nothing is downloaded.

    Args:
        spec: ``torchvision:resnet18`` (its classifiers), ``timm:NAME``, or
            ``package.module:factory``, called without arguments; the working directory is
            importable meanwhile.

    Raises:
        LoadError: an unknown name, a failing import or factory, or a result that is no nn.Module.

    Example:
        >>> type(build_arch("torchvision:resnet18")).__name__
        'ResNet'
    """
    room, colon, name = spec.partition(":")
    if not colon or not room or not name:
        raise LoadError(f"{spec!r} is not an arch spec",
                        fix="Use torchvision:NAME, timm:NAME or package.module:factory.")
    if room == "torchvision":
        models = _import("torchvision.models", spec)
        known = models.list_models(module=models)
        _check_name(spec, name, known, "torchvision's classifiers")
        # Their default fills the weights from a slow truncated normal; the modules are the same.
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return _made(spec, functools.partial(models.get_model, name, weights=None, **options))
    if room == "timm":
        timm = _import("timm", spec)
        # The part before the dot is the architecture; "hf-hub:" and "local-dir:" are not names.
        _check_name(spec, name.partition(".")[0], timm.list_models(), "timm's models")
        return _made(spec, functools.partial(timm.create_model, name, pretrained=False))
    with _working_directory_importable():
        module = _import(room, spec)
        factory = getattr(module, name, None)
        if not callable(factory) or isinstance(factory, nn.Module):
            have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise LoadError(f"{spec}: {room} has no function or class {name!r}"
                            if factory is None else f"{spec}: {name} is a {type(factory).__name__}",
                            why=_nearest(name, have),
                            fix="Name a function or class that returns the model when called "
                                "without arguments.")
        return _made(spec, factory)


def load_model(model: str, *, arch: str | None = None, trust: bool = False) -> nn.Module:
    """Load a model from a file or an arch spec, on the CPU and in eval mode.

    Args:
        model: an arch spec; or a file: a whole model or a state dict from ``torch.save``, or
            safetensors. A checkpoint dict is searched for ``state_dict``, ``model_state_dict``,
            ``model`` and ``net``; DataParallel and torch.compile wrappers are taken off.
        arch: arch spec of the model that a state dict fills.
        trust: let the file's pickle import and run anything.

    Raises:
        LoadError: a file that cannot be read, may not be read safely, or does not fit ``arch``.
    """
    if is_arch_spec(model):
        if arch is not None:
            raise LoadError(f"{model} is an arch spec already, and so is arch={arch!r}",
                            fix="Give a file and --arch, or an arch spec alone.")
        return build_arch(model).eval()
    path = Path(model)
    _check_file(path)
    if path.suffix == ".safetensors":
        content: object = _read_safetensors(path)
    else:
        with path.open("rb") as file:
            content = read_pickle(file, str(path), trust=trust)
    if isinstance(content, Mapping):
        content = next((content[key] for key in _STATE_KEYS
                        if isinstance(content.get(key), (Mapping, nn.Module))), content)
    if isinstance(content, nn.Module):
        if arch is not None:
            raise LoadError(f"{path} holds a whole {type(content).__name__}, not a state dict",
                            fix="Leave --arch out.")
        return _unwrap(content, path).eval()
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content) or not any(
            isinstance(v, Tensor) for v in content.values()):
        keys = ", ".join(map(repr, list(content)[:5])) if isinstance(content, Mapping) else ""
        raise LoadError(f"{path} holds a {type(content).__name__}"
                        + (f" with the keys {keys}" if keys else ""),
                        why="That is neither a model nor a state dict.")
    if arch is None:
        raise LoadError(f"{path} is a state dict: weights without the model they belong to",
                        fix="Name the model with --arch: torchvision:NAME, timm:NAME or "
                            "package.module:factory.")
    network = build_arch(arch)
    _fill(network, content, path, arch)
    return network.eval()


def read_pickle(file: BinaryIO, where: str, *, trust: bool = False) -> object:
    """Read what ``torch.save`` wrote, importing only what the allow-list above takes.

    Args:
        file: an open, seekable binary file.
        where: its name, for errors.
        trust: import and run whatever the file asks for.

    Raises:
        LoadError: a damaged file, or one that names a global outside the allow-list.
    """
    if trust:
        with _working_directory_importable():
            return _torch_load(file, where, weights_only=False)
    names: list[str] = []
    start = file.read(4)
    file.seek(0)
    if start == b"PK\x03\x04":
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            code = torch._C.PyTorchFileReader(file).get_record("data.pkl") if names else b""
        except Exception as error:  # whatever a hostile or damaged file makes the readers raise
            raise _unreadable(where, error) from error
        file.seek(0)
    elif start[:2] != b"\x80\x02":
        raise _unreadable(where, ValueError("neither a zip nor a pickle of protocol 2"))
    allowed = {name: _allowed(name) for name in names}
    refused = sorted(name for name, value in allowed.items() if value is None)
    if not refused and names:
        refused = _check_calls(code, allowed, where)
    if refused:
        raise _refusal(where, refused)
    # What the user registered is not among `names`, so leaving this context removes only ours.
    with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        return _torch_load(file, where, weights_only=True)


def _inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def _allowed(path: str) -> Any:
    """Return the global that ``path`` names if the allow-list takes it, else None."""
    module, _, name = path.rpartition(".")
    if path == "functools.partial":
        return functools.partial
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
        restores = getattr(value.__setstate__, "__module__", "").startswith("torch.nn.modules.")
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


def _torch_load(file: BinaryIO, where: str, *, weights_only: bool) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a damaged or hostile file raises anything
        if weights_only:
            text = str(error)
            found = (re.search(r"GLOBAL (\S+) was not an allowed global", text)
                     or re.search(r"unsupported GLOBAL (\S+) whose", text))
            if found and _allowed(found[1]) is not None:
                raise LoadError(f"{where} is a whole model in torch's old file format",
                                why="Of that format only state dicts can be read safely.",
                                fix="Save it again with torch 1.6 or later, or use --trust "
                                    "(trust=True) if you trust the file.") from error
            if found:
                raise _refusal(where, [found[1]]) from error
        elif isinstance(error, (ImportError, AttributeError)):
            raise LoadError(f"{where} needs a class that is not here",
                            why=f"{type(error).__name__}: {error}",
                            fix="Start where that module can be imported, or save the state dict "
                                "and name the model with --arch.") from error
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: BaseException) -> LoadError:
    reason = str(error).strip().partition("\n")[0]
    return LoadError(f"{where} cannot be read: it is damaged or was not written by torch.save",
                     why=f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


def _refusal(where: str, names: list[str]) -> LoadError:
    compiled = any(name.startswith("torch._dynamo.") for name in names)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return LoadError(f"{where} is not loaded: it asks for {shown}",
                     why="A pickle can run code through what it names; only modules of torch.nn, "
                         "torchvision and timm are taken as harmless. Nothing was run.",
                     fix=("It is a torch.compile wrapper: save its _orig_mod. " if compiled else "")
                         + "If you trust the file, use --trust (trust=True); else save the state "
                         "dict and name the model with --arch.")


def _check_file(path: Path) -> None:
    """Raise what can be said about a file before any reader sees it."""
    if not path.exists():
        raise LoadError(f"{path} does not exist", fix=f"A model is {MODEL_HELP}.")
    if path.is_dir():
        raise LoadError(f"{path} is a directory", fix="Name the file in it.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise LoadError(f"{path} cannot be opened", why=str(error)) from error
    if not start:
        raise LoadError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path} is a Git LFS pointer, not the file itself",
                        fix="Fetch the file: git lfs pull")
    if path.suffix == ".safetensors":
        return
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise LoadError(f"{path} is damaged: its end is missing",
                            why=f"It starts like a file of torch.save, but: {error}.",
                            fix="Copy or download it again.") from error
        if "manifest.json" in names:
            raise LoadError(f"{path} is in quantguard's own format", fix="Use quantguard.load.")
        if any(name.endswith("/constants.pkl") for name in names):
            raise LoadError(f"{path} is a TorchScript archive (torch.jit.save)",
                            why="Its forward is compiled code without modules to convert.",
                            fix="Use the model it was scripted from.")
        if not any(name.endswith("/data.pkl") for name in names):
            raise LoadError(f"{path} is a zip, but not one of torch.save",
                            why=f"It holds {', '.join(names[:3]) or 'nothing'}.")
    elif not start.startswith(b"\x80"):  # the opcode that starts a binary pickle
        raise LoadError(f"{path} is not a model file", why=f"It starts with {start[:16]!r}.",
                        fix=f"A model is {MODEL_HELP}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is not a readable safetensors file", why=str(error)) from error


def _unwrap(model: nn.Module, path: Path) -> nn.Module:
    """Take off DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        else:
            break
        if not isinstance(inner, nn.Module):
            raise LoadError(f"{path} holds a {type(model).__name__} around nothing")
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise LoadError(f"{path} holds a TorchScript module",
                        why="Its forward is compiled code without modules to convert.",
                        fix="Use the model it was scripted from.")
    return model


def _fill(model: nn.Module, state: Mapping[str, Any], path: Path, arch: str) -> None:
    """Load ``state`` into ``model``: every key and shape, or one error that lists the rest."""
    own = model.state_dict()

    def strip(key: str) -> str:
        return key.replace("_orig_mod.", "")

    while all(strip(k).startswith("module.") for k in state) and not all(
            k.startswith("module.") for k in own):
        state = {strip(k).removeprefix("module."): v for k, v in state.items()}
    state = {strip(k): v for k, v in state.items()}
    both = [(k, v, own.get(k)) for k, v in state.items()]
    shapes = [(k, tuple(v.shape), tuple(o.shape)) for k, v, o in both
              if isinstance(v, Tensor) and isinstance(o, Tensor) and v.shape != o.shape]
    # Files from before torch 0.4 lack this counter, which changes nothing in eval mode.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    problems = [f"{k} is {there} in the file and {here} in the model"
                + (": number of classes?" if there[1:] == here[1:] else "")
                for k, there, here in shapes[:3]]
    problems += [f"{len(keys)} {what}: {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")
                 for keys, what in ((missing, "missing from the file"),
                                    (unexpected, "not in the model")) if keys]
    if len(shapes) > 3:
        problems.append(f"{len(shapes) - 3} more shapes differ")
    if problems:
        raise LoadError(f"{path} does not fit {arch}", why="\n".join(problems),
                        fix="Name the arch that it was saved from; for another number of classes, "
                            "write a factory: --arch package.module:factory")
    # Some modules (MNASNet) need their version beside the weights; bare dicts have lost it.
    filled = type(own)(state)
    filled._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(filled, strict=False)
    except Exception as error:
        raise LoadError(f"{path} does not fit {arch}", why=str(error)) from error


def _made(spec: str, factory: Any) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        raise LoadError(f"{spec} failed while building the model",
                        why=f"{type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise LoadError(f"{spec}: {module} cannot be imported",
                        why=f"{type(error).__name__}: {error}",
                        fix="Install it, or start where it can be imported.") from error


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Import from the working directory, as ``python -m`` does and a console script does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _check_name(spec: str, name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise LoadError(f"{spec}: {name!r} is not one of {what}", why=_nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""
