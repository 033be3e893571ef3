"""Read only the weights of a pickle: nothing in it is imported, and nothing is run.

A pickle names the globals that it needs. Here each name is replaced: by one of the few makers
below, which build tensors and plain containers, or by an empty class whose instances, called
blanks, only store their content. So checkpoints with other objects beside the weights can be
read, and so can the weights of a model whose class must not be imported.
"""

from __future__ import annotations

import io
import pickle
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..errors import LoadError


class _Sealed(type):
    """Metaclass of the replacement classes, which a pickle cannot modify."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} takes no attributes")


class _Items(dict[Any, Any], metaclass=_Sealed):
    """A dict without attributes; those of a state dict (versions of modules) are not needed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Discard the state."""


class Blank(dict[Any, Any], metaclass=_Sealed):
    """Placeholder of an object whose class is not imported.

    Attributes:
        state: the state of the object in the pickle; its items are those of the dict.
    """

    __slots__ = ("state",)
    dump_patches = False  # torch reads this attribute of modules in its old format

    def __new__(cls, *args: Any, **kwargs: Any) -> Blank:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Blank:
        return Blank()

    def append(self, item: Any) -> None:
        """Discard an item of a list."""

    def extend(self, items: Any) -> None:
        """Discard items of a list."""

    def add(self, item: Any) -> None:
        """Discard an item of a set."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Maker:
    """Wrapper of a function, without attributes that a pickle could modify."""

    __slots__ = ("__function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__function = function

    def __call__(self, *args: Any) -> Any:
        return self.__function(*args)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    tensor: Tensor = torch._utils._rebuild_tensor(  # type: ignore[no-untyped-call]
        storage, offset, size, stride)
    return tensor


def _typed(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Return a pickled instance of a Tensor subclass as a plain tensor."""
    return function(*args) if isinstance(function, _Maker) else Blank()


def _encoded(text: Any, encoding: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Blank()


def _storage(content: Any) -> Any:
    return _read(io.BytesIO(content), [])


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Items, "collections.defaultdict": lambda *_: _Items(),
    "builtins.dict": dict, "__builtin__.dict": dict, "builtins.set": set, "__builtin__.set": set,
    "torch.Size": tuple, "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.storage._load_from_bytes": _storage}


def read_blank(file: BinaryIO, where: str) -> tuple[object, list[str]]:
    """Read only the weights of a pickle, whether torch.save wrote it or not.

    Args:
        file: an open, seekable binary file.
        where: its name, for errors.

    Returns:
        Its content, with blanks in place of other objects; and the names of their classes and
        functions.

    Raises:
        LoadError: it cannot be read.
    """
    names: list[str] = []
    try:
        return _read(file, names), list(dict.fromkeys(names))
    except Exception as error:  # a damaged or hostile file may raise anything
        raise LoadError(f"the weights of {where} cannot be read",
                        why=f"{type(error).__name__}: {error}") from error


def state_of(module: object) -> dict[str, Any] | None:
    """Return the state dict of a module or of the blank of a module; None for other objects."""
    if isinstance(module, nn.Module):
        return dict(module.state_dict())
    if not isinstance(module, Blank) or not isinstance(module.state, dict) \
            or not isinstance(module.state.get("_modules"), dict):
        return None
    return dict(_states(module.state, "", frozenset()))


def _states(state: Mapping[str, Any], prefix: str, above: frozenset[int]
            ) -> Iterator[tuple[str, Tensor]]:
    if id(state) in above:
        raise LoadError("a module of the file contains itself")
    above |= {id(state)}
    hidden = state.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(state.get(kind)):
            if isinstance(value, Tensor) and not (kind == "_buffers" and
                                                  isinstance(hidden, set) and name in hidden):
                yield f"{prefix}{name}", value.detach()
    for name, child in _items(state.get("_modules")):
        if isinstance(child, Blank) and isinstance(child.state, dict):
            yield from _states(child.state, f"{prefix}{name}.", above)


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _read(file: Any, names: list[str]) -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full in _MAKERS:
                return _Maker(_MAKERS[full])
            names.append(full)
            return _Sealed("Blank", (Blank,), {"__slots__": ()})

    def load(source: Any, **options: Any) -> Any:
        return Unpickler(source, **options).load()

    start = file.read(14)
    file.seek(0)
    if start[:2] != b"PK" and not is_torchs(start):
        return load(file)
    if start[:2] != b"PK":
        # In memory, because torch would try to unpack a file on disk as a tar archive.
        file = io.BytesIO(file.read())
    reader: Any = types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="blank")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it cannot compare sources of classes
        return torch.load(file, map_location="cpu", pickle_module=reader, weights_only=False)


def is_torchs(start: bytes) -> bool:
    """Return whether the first 14 bytes of a file are those of torch.save's old format."""
    return start[:4] == b"\x80\x02\x8a\n" and start[4:14] == _MAGIC


_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
