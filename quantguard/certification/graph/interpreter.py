"""Runs of a model graph on intervals in place of tensors, for any kind of interval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, fx

from .graph import ModelGraph
from .nodes import attribute, is_shape_query

V = TypeVar("V")


class IntervalInterpreter(ABC, Generic[V]):
    """One run of a graph on intervals; subclasses say how rules are applied.

    Attributes:
        graph: the model as one graph.
        interval: the type of intervals.
    """

    interval: type[V]

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph

    def run(self, x: V) -> Any:
        """Return what the graph returns for the interval of its input."""
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            args: Any = fx.node.map_arg(node.args, values.__getitem__)
            kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
            if node.op == "output":
                return args[0]
            value = x if node.op == "placeholder" else self._value(node, args, kwargs)
            values[node] = self.computed(node, value)
            for unread in self.graph.last_use[node]:
                del values[unread]
        raise AssertionError("a graph ends with its output")

    def _value(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr":
            return attribute(self.graph.root, str(node.target))
        if self.holds_intervals(args, kwargs) and not is_shape_query(node):
            return self.bound(node, args, kwargs)
        plain_args, plain_kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda v: self.plain(v) if isinstance(v, self.interval) else v)
        return self.call(node, *plain_args, **plain_kwargs)

    def holds_intervals(self, *values: Any) -> bool:
        """Return whether an interval is among values, however they are nested."""
        found: list[Any] = []
        fx.node.map_aggregate(
            values, lambda v: found.append(v) if isinstance(v, self.interval) else None)
        return bool(found)

    def call(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """Return what a node's operation computes."""
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = self.graph.module(node) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    @abstractmethod
    def bound(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the intervals of a node's result."""

    @abstractmethod
    def plain(self, value: V) -> Tensor:
        """Return a tensor of an interval's shape, for operations that only read shapes."""

    def computed(self, node: fx.Node, value: Any) -> Any:
        """Return what to keep of a node's value."""
        return value
