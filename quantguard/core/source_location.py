"""Where a call is in the source code, and whose code that is."""

from __future__ import annotations

import functools
import itertools
import os
import sysconfig
import types

import torch
from torch import nn

TORCH = os.path.dirname(torch.__file__) + os.sep
PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep  # this package, all of its rooms
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_SITES = {sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib")}
_TORCH_MODULES = os.path.join(TORCH, "nn", "modules") + os.sep
_MODULE_FILE = nn.Module._call_impl.__code__.co_filename


def library(file: str) -> bool:
    """Return whether a source file belongs to torch, this package or the standard library."""
    return file.startswith((TORCH, PACKAGE)) or file.startswith("<frozen") or (
        file.startswith(STDLIB) and not any(file.startswith(site) for site in _SITES))


def place_of(frame: types.FrameType | None, last: types.FrameType | None = None,
             ) -> tuple[str, str]:
    """Return the source location of a call, innermost frame outside of torch first.

    Args:
        frame: the call's frame.
        last: the forward's frame; None: stop at the first frame of this package.

    Returns:
        File and line for messages; and the location relative to the first line of each function,
        which does not change when the file is edited elsewhere.
    """
    where, places = "", []
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        ours = file.startswith(PACKAGE)
        if frame is last or (last is None and ours):
            break
        line, column = _position(code, frame.f_lasti)
        frame = frame.f_back
        if ours or file == "<string>" or (file.startswith(TORCH)
                                          and not file.startswith(_TORCH_MODULES)):
            continue
        if file == _MODULE_FILE:  # nn.Module.__call__ around a forward
            continue
        where = where or f"{_short(file)}:{line}"
        if not code.co_name.startswith("<") or code.co_name == "<lambda>":
            places.append(f"{code.co_name}+{line - code.co_firstlineno}:{column}")
    return where, "<".join(places)


@functools.lru_cache(4096)
def _position(code: types.CodeType, instruction: int) -> tuple[int, int]:
    """Return line and column of an instruction; the column separates calls on one line."""
    position = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    line, _, column, _ = position or (None, None, None, None)
    return line or code.co_firstlineno, column or 0


def _short(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])
