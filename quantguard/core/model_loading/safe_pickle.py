"""Read a file of ``torch.save`` through an allow-list: no code from the file is run."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from ..errors import LoadError
from .allow_list import allowed
from .pickle_calls import forbidden_calls
from .pickle_errors import old_format, plain_pickle, refusal, unreadable
from .weights_only import is_torchs


def read_pickle(file: BinaryIO, where: str, *, trust: bool = False, main: Any = None) -> object:
    """Read a file of ``torch.save``; import only globals of the allow-list.

    Args:
        file: an open, seekable binary file.
        where: its name, for errors.
        trust: import and run everything that the file names; also read plain pickles.
        main: with trust, the module of the classes that the file names ``__main__.NAME``.

    Raises:
        LoadError: the file is damaged, or names a global outside of the allow-list.
    """
    start = file.read(14)
    file.seek(0)
    plain = start[:4] != b"PK\x03\x04" and start[:1] == b"\x80" and not is_torchs(start)
    if trust:
        with working_directory_importable():
            return _trusted(file, where, main, plain)
    if plain:
        raise plain_pickle(file, where)
    names: list[str] = []
    if start[:4] == b"PK\x03\x04":
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            file.seek(0)
            code = torch._C.PyTorchFileReader(file).get_record("data.pkl") if names else b""
        except Exception as error:  # a hostile or damaged file may raise anything
            raise unreadable(where, error) from error
        file.seek(0)
    elif not is_torchs(start):
        raise unreadable(where, ValueError("neither a zip nor a pickle"))
    found = {name: allowed(name) for name in names}
    refused = sorted(name for name, value in found.items() if value is None)
    if not refused and names:
        refused = forbidden_calls(code, found, where)
    if refused:
        raise refusal(where, refused)
    # `names` excludes globals that the user registered, so the context does not remove those.
    with torch.serialization.safe_globals([(value, name) for name, value in found.items()]):
        return _torch_load(file, where)


def _trusted(file: BinaryIO, where: str, main: Any, plain: bool) -> object:
    """Read a file that may run code; names of its ``__main__`` are looked up in ``main``."""
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
    except Exception as error:  # a damaged file may raise anything
        if not isinstance(error, (ImportError, AttributeError)):
            raise unreadable(where, error) from error
        fix = "Start in a folder from which that module can be imported, or save the state dict " \
              "and name the model with --arch."
        if "__main__" in str(error):
            fix = "A script saved it, with a class of its own: name that with --arch file.py:Class."
        elif main is not None:
            fix = f"A script saved the file; its names are looked up in {main.__name__}."
        raise LoadError(f"{where} needs a class that cannot be imported",
                        why=f"{type(error).__name__}: {error}", fix=fix) from error


def _torch_load(file: BinaryIO, where: str) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        text = str(error)
        found = (re.search(r"GLOBAL (\S+) was not an allowed global", text)
                 or re.search(r"unsupported GLOBAL (\S+) whose", text))
        if found and allowed(found[1]) is not None:
            raise old_format(where) from error
        if found:
            raise refusal(where, [found[1]]) from error
        raise unreadable(where, error) from error


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Context in which modules of the working directory can be imported, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
