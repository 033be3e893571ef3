"""Find the places in a module's source that name an activation or may spell one out."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..nn.activation_kinds import (
    ALWAYS_EXCLUDED,
    kind_of,
)
from ..nn.numeric_match import operation
from .runtime_recorder import RunLog

_SPELLING = frozenset(("clamp", "clamp_", "clamp_min", "clip", "maximum", "masked_fill"))


class Candidate(NamedTuple):
    """A place in the source that may compute an activation; kind is set if it names one."""

    key: str
    place: str
    where: str
    kind: str | None


def _candidates(cls: type[nn.Module]) -> Iterator[Candidate]:
    """Yield the places in the methods of cls that name or may spell out an activation."""
    functions: dict[str, list[types.FunctionType]] = {}
    for c in cls.__mro__:
        for name, f in vars(c).items() if not c.__module__.startswith("torch.") else ():
            above = functions.setdefault(name, []) if isinstance(f, types.FunctionType) else None
            if above is not None and all(_calls_super(g) for g in above):
                above.append(f)
    for name, found in functions.items():
        if not name.startswith("__"):
            for function in found:
                for part in functions_of(function):
                    yield from _candidates_in(part.__code__)


def functions_of(function: Any) -> Iterator[types.FunctionType]:
    """Yield a function and the functions that it wraps."""
    while function is not None:
        if isinstance(function, types.FunctionType):
            yield function
        function = getattr(function, "__wrapped__", None)


def _calls_super(function: types.FunctionType) -> bool:
    return any("super" in part.__code__.co_names for part in functions_of(function))


@functools.lru_cache(4096)
def _candidates_in(code: types.CodeType) -> tuple[Candidate, ...]:
    """Return the places in one function's code; instructions are decoded only if necessary."""
    called = {name: kind for name in code.co_names
              if (kind := _kind_named(name)) or name in _SPELLING}
    operations = set(code.co_code[::2])
    if not called and not {dis.opmap["COMPARE_OP"], dis.opmap["BINARY_OP"]} <= operations:
        return ()
    found: list[Candidate] = []
    file = code.co_filename.replace("\\", "/").split("/")
    lines: dict[int, set[str]] = {}
    for step in dis.get_instructions(code):
        line = step.positions.lineno if step.positions is not None else None
        if line is not None:
            named = step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")
            lines.setdefault(line, set()).add(
                str(step.argval) if named else step.opname + str(step.argrepr))
    for line, names in lines.items():
        place = f"{code.co_name}+{line - code.co_firstlineno}"
        where = f"{'/'.join(file[-2:])}:{line}"
        for name in names & called.keys():
            found.append(Candidate(operation(name), place, where, called[name]))
        if names & {"BINARY_OP*", "BINARY_OP*="} and any(
                name.startswith("COMPARE_OP") for name in names):
            found.append(Candidate("mul", place, where, None))
    return tuple(found)


def _kind_named(name: str) -> str | None:
    """Return the convertible kind that a name in source code may stand for, or None.

    The name may be anything, such as ``__dict__``, ``Tensor`` or ``math`` in torch's module.
    """
    kind = kind_of(name) or kind_of(getattr(nn.functional, name, None))
    return None if kind in ALWAYS_EXCLUDED else kind


def unreached(module: nn.Module, cls: type[nn.Module], log: RunLog) -> Iterator[Candidate]:
    """Yield the places that no run reached; a name of a child is not a function."""
    for candidate in _candidates(cls):
        if (candidate.key, candidate.place) not in log.reached \
                and not hasattr(module, candidate.key):
            yield candidate
