"""One graph of the whole model, traced by torch.fx from pixels to logits."""

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

from ..activation import QuantActivation
from ..batches import to_pixels
from ..errors import ConversionError
from ..running import duplicate, picked
from ..spec import Threat
from ..tracing import place_of


class Whole(nn.Module):
    """Compute logits from pixels; calls the model, so that its own hooks run."""

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


class _InPlace(fx.Proxy):
    """A value that notes ``x += y``: torch.fx would take it for ``x + y``, and lose the write."""

    def __iadd__(self, other: Any) -> Any:
        return _written("iadd", self, other)

    def __isub__(self, other: Any) -> Any:
        return _written("isub", self, other)

    def __imul__(self, other: Any) -> Any:
        return _written("imul", self, other)

    def __itruediv__(self, other: Any) -> Any:
        return _written("itruediv", self, other)


def _written(name: str, x: fx.Proxy, other: Any) -> Any:
    return x.tracer.create_proxy("call_function", getattr(operator, name), (x, other), {})


class _Tracer(fx.Tracer):
    """Trace through everything but layers and staircases; remember what was refused.

    Attributes:
        refusal: the first one; a forward may have caught it and gone on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: Exception | None = None

    def _asked(self, ask: Callable[[fx.Proxy], Any], value: fx.Proxy) -> Any:
        try:
            return ask(value)
        except Exception as error:
            self.refusal = self.refusal or error
            raise

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._asked(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return self._asked(super().iter, obj)  # type: ignore[no-any-return]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A rewritten layer of torch's, a PReLU for one, has a forward of its own.
        rewritten = hasattr(type(m), "_user_class") and "forward" in vars(type(m))
        return isinstance(m, QuantActivation) or (
            not rewritten and super().is_leaf_module(m, module_qualified_name))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlace(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # In a forward that torch.fx could not trace at conversion calls are told apart as it runs.
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
           pixels: Tensor) -> tuple[Whole, fx.Graph]:
    """Return a copy of a model, from pixels to logits, and the graph of its forward.

    Raises:
        ConversionError: torch.fx cannot trace it, or it draws random numbers.
    """
    kind = type(model).__name__
    try:
        root = Whole(duplicate(model), threat, key, pixels).eval()
        before, tracer = _dice(), _Tracer()
        graph = tracer.trace(root)
        rolled = before != _dice()
        if tracer.refusal is not None:
            raise tracer.refusal
    except Exception as error:  # whatever torch.fx or the forward raises on symbolic values
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"the forward of {kind} cannot be traced into one graph", why=f"It says: {said[0]}",
            fix="A certificate needs a forward without branches on values.") from error
    if rolled:
        raise ConversionError(f"the forward of {kind} draws random numbers",
                              why="A certificate is for a model that gives one answer.")
    return root, graph


def _dice() -> tuple[Any, ...]:
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(),
            str(numpy.random.get_state()))
