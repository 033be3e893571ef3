"""Check the calls in a pickle without running it."""

from __future__ import annotations

import functools
import pickletools
from collections.abc import Mapping
from enum import Enum
from typing import Any

from .pickle_errors import unreadable

# The one function on torch's own list that calls its argument.
_CALLER = "torch._tensor._rebuild_from_type_v2"
# Opcodes of torch's reader that only push, pop or combine plain values.
_PLAIN = ("PROTO", "STOP", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT",
          "EMPTY_SET", "BINPERSID", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE",
          "SHORT_BINSTRING", "LONG1", "TUPLE1", "TUPLE2", "TUPLE3")


class _Global(str):
    """A global on the simulated stack of a pickle."""


def forbidden_calls(code: bytes, allowed: Mapping[str, Any], where: str) -> list[str]:
    """Return the names that a pickle calls and may not, by a simulation of its stack.

    A pickle may call the functions that torch allows by itself, partial and Enums. Instances of
    other allowed classes are created without arguments and get their state once: a second state
    could go to a ``__setstate__`` that the first one installed.

    Args:
        code: the pickle.
        allowed: the globals of the allow-list that it names.
        where: name of the file, for errors.

    Raises:
        LoadError: the pickle is damaged, or has opcodes that torch.save does not write.
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
                # The reader renames modules of Python 2; none of the new names is in `allowed`.
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
                built[id(stack[-1])] = stack[-1]  # a reference, so that its id is not used again
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
        raise unreadable(where, error) from error
    return sorted(refused)
