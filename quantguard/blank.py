"""The weights in a pickle, whatever else it holds: nothing else is imported, nothing is run.

A pickle names what it needs. Here a name stands for one of the few makers below, which build
tensors and plain containers, or for a blank: an object of a class made on the spot that does
nothing and only holds what it is given. So a checkpoint with its author's settings beside the
weights can be read, and so can the weights of a model whose class is not to be imported.
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

from .errors import LoadError


class _Sealed(type):
    """The type of blank classes: a pickle may not change them."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} takes no attributes")


class _Items(dict[Any, Any], metaclass=_Sealed):
    """A dict without attributes: those of a state dict, versions of modules, are not needed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Forget it."""


class Blank(dict[Any, Any], metaclass=_Sealed):
    """Stand for an object of a class that is not imported: its items, and its state."""

    __slots__ = ("state",)
    dump_patches = False  # torch asks this of modules in its old format

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
        """Take an item of a list, and forget it."""

    def extend(self, items: Any) -> None:
        """Take items of a list, and forget them."""

    def add(self, item: Any) -> None:
        """Take an item of a set, and forget it."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Maker:
    """Call a function; unlike the function itself it has nothing that a pickle could change."""

    __slots__ = ("__function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__function = function

    def __call__(self, *args: Any) -> Any:
        return self.__function(*args)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    made: Tensor = torch._utils._rebuild_tensor(  # type: ignore[no-untyped-call]
        storage, offset, size, stride)
    return made


def _typed(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Make the tensor that a subclass of Tensor was pickled from, as a plain one."""
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
    """Read a pickle, of ``torch.save`` or not, for its weights alone.

    Args:
        file: an open, seekable binary file.
        where: its name, for errors.

    Returns:
        What it holds, blanks among it; and the names of what these stand for.

    Raises:
        LoadError: it cannot be read.
    """
    names: list[str] = []
    try:
        return _read(file, names), list(dict.fromkeys(names))
    except Exception as error:  # a damaged or hostile file raises anything
        raise LoadError(f"{where} cannot be read for its weights",
                        why=f"{type(error).__name__}: {error}") from error


def state_of(module: object) -> dict[str, Any] | None:
    """Return the state dict of a module, or of a blank that stands for one; None: it is neither."""
    if isinstance(module, nn.Module):
        return dict(module.state_dict())
    if not isinstance(module, Blank) or not isinstance(module.state, dict) \
            or not isinstance(module.state.get("_modules"), dict):
        return None
    return dict(_states(module.state, "", frozenset()))


def _states(state: Mapping[str, Any], prefix: str, above: frozenset[int]
            ) -> Iterator[tuple[str, Tensor]]:
    if id(state) in above:
        raise LoadError("a module of the file holds itself")
    above |= {id(state)}
    hidden = state.get("_non_persistent_buffers_set")
    for place in ("_parameters", "_buffers"):
        for name, value in _items(state.get(place)):
            if isinstance(value, Tensor) and not (place == "_buffers" and
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
        # Of a file on the disk torch would also try whether it is a tar, and unpack that.
        file = io.BytesIO(file.read())
    reader: Any = types.SimpleNamespace(Unpickler=Unpickler, load=load, __name__="blank")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sources of classes cannot be compared
        return torch.load(file, map_location="cpu", pickle_module=reader, weights_only=False)


def is_torchs(start: bytes) -> bool:
    """Return whether the first 14 bytes are those of a file of ``torch.save``, of its old form."""
    return start[:4] == b"\x80\x02\x8a\n" and start[4:14] == _MAGIC


_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
