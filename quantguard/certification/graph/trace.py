"""Tracing of a whole model with torch.fx, from pixels to logits."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from ...core.errors import ConversionError
from ...core.model_calls import picked
from ...core.module_utils import duplicate
from ...core.source_location import place_of
from ...core.specs import Threat
from ...data.batches import to_pixels
from ...nn.quant_activation import QuantActivation


class PixelsToLogits(nn.Module):
    """A model with its normalisation; it calls the model, so that the model's hooks run."""

    def __init__(self, model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> None:
        super().__init__()
        self.model, self.key = model, key
        self.mean = self.std = None
        if threat.mean is not None:
            self.mean = to_pixels(torch.zeros_like(pixels[:1]), replace(threat, std=None))
        if threat.std is not None:
            self.std = to_pixels(torch.ones_like(pixels[:1]), replace(threat, mean=None))

    def forward(self, x: Any) -> Any:
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        output = self.model(x) if self.key is None else self.model(**{self.key: x})
        return picked(output)


class _InPlaceProxy(fx.Proxy):
    """A proxy that records ``x += y``; torch.fx reads it as ``x + y`` and loses the write."""

    def __iadd__(self, other: Any) -> Any:
        return _record_write("iadd", self, other)

    def __isub__(self, other: Any) -> Any:
        return _record_write("isub", self, other)

    def __imul__(self, other: Any) -> Any:
        return _record_write("imul", self, other)

    def __itruediv__(self, other: Any) -> Any:
        return _record_write("itruediv", self, other)


def _record_write(name: str, x: fx.Proxy, other: Any) -> Any:
    return x.tracer.create_proxy("call_function", getattr(operator, name), (x, other), {})


class _Tracer(fx.Tracer):
    """A tracer that stops only at torch's layers and at quantizers, and remembers refusals.

    Attributes:
        refusal: the first error that a proxy raised; the forward may have caught it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: Exception | None = None

    def _remembering(self, convert: Callable[[fx.Proxy], Any], value: fx.Proxy) -> Any:
        try:
            return convert(value)
        except Exception as error:
            self.refusal = self.refusal or error
            raise

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._remembering(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return self._remembering(super().iter, obj)  # type: ignore[no-any-return]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A layer of torch's that conversion has rewritten (a PReLU) has a forward of its own.
        rewritten = hasattr(type(m), "_user_class") and "forward" in vars(type(m))
        return isinstance(m, QuantActivation) or (
            not rewritten and super().is_leaf_module(m, module_qualified_name))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # In a forward that conversion could not trace, quantizers are chosen as it runs.
        other = m.instead() if isinstance(m, QuantActivation) and m.instead is not None else None
        return super().call_module(m, forward, args, kwargs) if other is None else \
            other(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise fx.proxy.TraceError("autocast, which computes in less than float32")
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = place_of(sys._getframe(1))[0]
        return node


def traced(model: nn.Module, threat: Threat, key: str | None,
           pixels: Tensor) -> tuple[PixelsToLogits, fx.Graph]:
    """Return a copy of a model with its normalisation, and the graph of its forward.

    Raises:
        ConversionError: torch.fx cannot trace it, or it draws random numbers.
    """
    kind = type(model).__name__
    try:
        root = PixelsToLogits(duplicate(model), threat, key, pixels).eval()
        before, tracer = _random_states(), _Tracer()
        graph = tracer.trace(root)
        is_random = before != _random_states()
        if tracer.refusal is not None:
            raise tracer.refusal
    except Exception as error:  # whatever torch.fx or the forward raises on symbolic values
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"the forward of {kind} cannot be traced into one graph", why=f"Error: {message[0]}",
            fix="A certificate needs a forward without branches on values.") from error
    if is_random:
        raise ConversionError(f"the forward of {kind} draws random numbers",
                              why="A certificate needs the same logits in every call.")
    return root, graph


def _random_states() -> tuple[Any, ...]:
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(),
            str(numpy.random.get_state()))
