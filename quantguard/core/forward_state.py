"""Whether a model's forward has state: whether its output can change between equal calls.

Such a model has to store something between two calls, or read a clock. The values in its modules,
and the values that the Python functions of its forward can see (arguments, closures, the globals
that they name), are compared between two calls on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .call_recorder import CallRecorder, profiled
from .object_state import StateTraversal, digest
from .source_location import library

__all__ = ["carried", "digest", "library", "profiled"]


def carried(model: nn.Module, call: Callable[[], Any]) -> str | None:
    """Return what a model carries from one call to another, or reads from outside.

    A cache that the first call fills is no state: the second and the third call are compared.

    Args:
        model: the model that is called.
        call: calls it once, always on the same inputs.

    Returns:
        One sentence, or None where nothing was found. State outside of the model's Python is not
        found: in a thread that is already running, in a file, in a C extension, or changed by
        other code between two calls.
    """
    call()
    found: list[tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = []
    for _ in range(2):
        recorder = CallRecorder(model)
        with profiled(recorder):
            call()
        if recorder.external:
            return f"It calls {recorder.external[0]}, whose result may differ from call to call."
        found.append((list(StateTraversal()(model, "model")), recorder.seen))
    for second, third in zip(*found, strict=True):
        for one, other in zip(second, third, strict=False):
            if one != other:
                return f"{one[0] if one[0] == other[0] else other[0]} changes from call to call, " \
                       "and a later output may depend on it."
        if len(second) != len(third):
            return "It stores more from call to call, and a later output may depend on it."
    return None
