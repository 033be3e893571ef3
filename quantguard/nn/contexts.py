"""Contexts that switch the quantizers of a model: off, to another gradient, or softened."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.errors import SpecError
from ..core.specs import plain
from .functional.staircase import MODES, Surrogate
from .quant_activation import quantizers


@contextmanager
def switched(model: nn.Module, change: dict[str, Any]) -> Iterator[nn.Module]:
    """Change fields of the :class:`QuantizerState` of every quantizer, inside the context."""
    before = [(module, module._state) for module in quantizers(model).values()]
    for module, state in before:
        module._state = state._replace(**change)
    try:
        yield model
    finally:
        for module, state in before:
            module._state = state


@contextmanager
def bypass(model: nn.Module) -> Iterator[nn.Module]:
    """Make a converted model compute exactly what the float model does, inside the context."""
    with switched(model, {"action": "bypass"}):
        yield model


@contextmanager
def at_bits(model: nn.Module, bits: int) -> Iterator[nn.Module]:
    """Give every quantizer this many bits over its present range, inside the context.

    Args:
        model: any module; one without quantizers is left as it is.
        bits: 1 to 8; 32 is :func:`bypass`.
    """
    if not (1 <= bits <= 8 or bits == 32):
        raise SpecError(f"bits={bits} must be 1 to 8, or 32")
    with bypass(model) if bits == 32 else switched(model, {"bits": bits}):
        yield model


@contextmanager
def backward(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Choose the surrogate gradient of every quantizer; outputs do not change.

    Args:
        model: any module; one without quantizers is left as it is.
        mode: ``ramp``, ``ste``, ``sigmoid`` (k = 8), ``sigmoid(k)`` or ``parent``.

    Raises:
        SpecError: an unknown mode.
    """
    with switched(model, {"surrogate": surrogate_of(mode)}):
        yield model


def surrogate_of(mode: str) -> Surrogate:
    """Return the surrogate gradient of this name, see :func:`backward`.

    Raises:
        SpecError: an unknown mode.
    """
    match = re.fullmatch(r"(\w+)(?:\((\d+(?:\.\d+)?)\))?", mode)
    if not match or match[1] not in MODES or (match[2] and match[1] != "sigmoid") \
            or (match[2] and float(match[2]) <= 0):
        raise SpecError(f"backward mode {mode!r} is unknown",
                        fix=f"Use one of {', '.join(MODES)}, or sigmoid(k).")
    return Surrogate(match[1], float(match[2] or 8.0))


@contextmanager
def soften(model: nn.Module, k: float, *, by_image: bool = False) -> Iterator[nn.Module]:
    """Replace every quantizer by a smooth function (soft quantization), inside the context.

    Args:
        model: any module; one without quantizers is left as it is.
        k: sharpness, positive and dimensionless: 2 is a smooth function, infinity is q itself.
        by_image: whether the width of a threshold's window is the median distance of an image's
            numbers from it, with which attacks find more, instead of the gap to its neighbours.
            Up to 4 bits.

    Raises:
        SpecError: k is not a positive number.
    """
    k = plain(k)
    if not (isinstance(k, (int, float)) and 0 < k < math.inf):
        raise SpecError(f"sharpness k={k!r} must be a positive number")
    with switched(model, {"action": "soften", "sharpness": float(k), "by_image": by_image}):
        yield model


@contextmanager
def listening(model: nn.Module,
              listeners: Mapping[str, Callable[[Tensor], None]]) -> Iterator[nn.Module]:
    """Pass the input of each named quantizer to its listener, before it is quantized."""
    modules = quantizers(model)
    try:
        for name, listener in listeners.items():
            modules[name]._listener = listener
        yield model
    finally:
        for module in modules.values():
            module._listener = None


@contextmanager
def observing(model: nn.Module,
              listeners: Mapping[str, Callable[[Tensor], None]]) -> Iterator[nn.Module]:
    """Run in float, and pass the output of each named activation f to its listener."""
    with listening(model, listeners), switched(model, {"action": "observe"}):
        yield model
