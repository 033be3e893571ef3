"""Trace one module's own forward with torch.fx, its children as leaves."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch import fx, nn

from ..core.model_calls import checkpoints_inlined
from ..core.source_location import PACKAGE, TORCH, place_of
from ..nn.activation_kinds import MODULE_KINDS
from .fx_variants import RecordedMode, Variant, planned_variants, specialized

_SWITCHES: dict[str, Any] = {name: getattr(torch, name) for name in (
    "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")}


class Tracer(fx.Tracer):
    """Tracer of one forward: every child is a leaf, every node has its place in the source."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m is self.root:
            raise fx.proxy.TraceError("a call of the module by itself")
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        grad, autocast = _SWITCHES["is_grad_enabled"], _SWITCHES["is_autocast_enabled"]
        now = grad(), autocast("cpu"), autocast("cuda")
        if getattr(self, "_modes", now) != now:
            raise fx.proxy.TraceError("a no_grad or autocast block, which a graph cannot hold")
        self._modes = now
        node = super().create_node(*args, **kwargs)
        node.meta["where"], node.meta["place"] = place_of(sys._getframe(1))
        return node


class Traced(NamedTuple):
    """Graph of one forward.

    Attributes:
        constants: tensors that the forward created, which the graph reads as attributes.
        by_mode: whether the forward read its mode.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    by_mode: bool


def trace(module: nn.Module, cls: type[nn.Module], variant: Variant,
          hidden: Iterable[str] = ()) -> Traced:
    """Trace one variant of the forward of cls on module, without changing module.

    Raises:
        Exception: whatever torch.fx or the forward raises on symbolic values.
    """
    mode = RecordedMode(variant.training)
    stand_in = object.__new__(specialized(cls, variant, mode))
    stand_in.__dict__.update({k: _copied(v) for k, v in module.__dict__.items() if k != "training"})
    children = stand_in.__dict__["_modules"]
    for name in hidden:
        children.pop(name, None)
    clones: dict[int, Any] = {}
    children.update({name: _stand_in(child, clones) for name, child in children.items()})
    separate_aliases(children)
    before = {k: _copied(v) for k, v in stand_in.__dict__.items()}
    with torch.random.fork_rng(devices=[]):
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        numpy_state = numpy.random.get_state()
        with checkpoints_inlined(), _switches_unreadable():
            graph = Tracer().trace(stand_in)
        drawn = not torch.equal(torch_state, torch.get_rng_state()) \
            or python_state != random.getstate() or not all(
                numpy.array_equal(a, b) for a, b in zip(numpy_state, numpy.random.get_state(),
                                                        strict=True))
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
    if drawn:
        raise fx.proxy.TraceError("random numbers, which a graph would fix as constants")
    changed = [k for k, v in before.items() if not _same(v, stand_in.__dict__.get(k))]
    constants = {k: v for k, v in stand_in.__dict__.items() if k not in before}
    changed += [k for k, v in constants.items() if not isinstance(v, torch.Tensor)]
    if changed:
        raise fx.proxy.TraceError(f"forward sets self.{changed[0]}, which a graph cannot hold")
    return Traced(graph, constants, mode.was_read)


def _stand_in(module: nn.Module | None, seen: dict[int, Any]) -> Any:
    """Return a stand-in for a child, without its mode and in the user's own class.

    A graph cannot depend on a child's mode, so a forward that reads it must fail to trace.
    """
    if module is None or id(module) in seen:
        return module if module is None else seen[id(module)]
    clone = object.__new__(getattr(type(module), "_user_class", type(module)))
    seen[id(module)] = clone
    clone.__dict__.update({k: v for k, v in module.__dict__.items() if k != "training"})
    clone.__dict__["_modules"] = {name: _stand_in(child, seen)
                                 for name, child in module.__dict__.get("_modules", {}).items()}
    return clone


@contextlib.contextmanager
def _switches_unreadable() -> Iterator[None]:
    """Make a forward that reads torch's global modes fail, since its graph would fix them."""
    def unreadable(name: str) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_code.co_filename.startswith((TORCH, PACKAGE)):
                raise fx.proxy.TraceError(f"it reads torch.{name}(), which a graph would fix")
            return _SWITCHES[name](*args, **kwargs)
        return refuse

    try:
        for name in _SWITCHES:
            setattr(torch, name, unreadable(name))
        yield
    finally:
        for name, function in _SWITCHES.items():
            setattr(torch, name, function)


def _copied(value: Any) -> Any:
    """Return a shallow copy of a container, so that a forward does not fill the user's own."""
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _same(one: Any, two: Any) -> bool:
    """Return whether an attribute is unchanged."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(
            two[k] is v for k, v in one.items())
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(
            a is b for a, b in zip(one, two, strict=True))
    return one == two if isinstance(one, set) else one is two


def separate_aliases(children: dict[str, Any]) -> None:
    """Give an activation module with several names in one parent one object for each name.

    torch.fx identifies a child by its object; activation modules have no state to share.
    """
    seen: set[int] = set()
    for name, child in children.items():
        if type(child) in MODULE_KINDS and id(child) in seen:
            children[name] = copy.copy(child)
        seen.add(id(child))


def planned_graphs(module: nn.Module, cls: type[nn.Module] | None = None,
                   hidden: Iterable[str] = ()) -> dict[Variant, Traced]:
    """Trace the planned variants of a module's forward.

    Both modes share the graph of a forward that never reads its mode.

    Args:
        cls: the user's class, if module has been rewritten.
        hidden: children that conversion added, hidden from forwards that iterate over children.

    Raises:
        Exception: a variant with optional arguments left out cannot be traced.
    """
    cls = cls or type(module)
    graphs: dict[Variant, Traced] = {}

    def add(variant: Variant) -> None:
        other = graphs.get(variant._replace(training=not variant.training))
        graphs[variant] = trace(module, cls, variant, hidden) if other is None or other.by_mode \
            else other

    first, second, *others = planned_variants(cls)
    add(first)
    add(second)
    for variant in others:
        # The optional arguments may be of any type here. A variant that cannot be traced now is
        # tried again when a caller passes them.
        with contextlib.suppress(Exception):
            add(variant)
    return graphs
