"""Trace one module's own forward with torch.fx, its children as leaves."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import os
import random
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch import fx, nn

from .kinds import MODULE_KINDS
from .running import checkpoints_inlined

_TORCH = os.path.dirname(torch.__file__) + os.sep
_TORCH_MODULES = os.path.join(_TORCH, "nn", "modules") + os.sep
_SWITCHES: dict[str, Any] = {name: getattr(torch, name) for name in (
    "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")}
_MODULE_FILE = nn.Module._call_impl.__code__.co_filename
_HERE = os.path.dirname(__file__) + os.sep


class Tracer(fx.Tracer):
    """Trace one forward with every child a leaf, noting where calls stand in the source."""

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


def place_of(frame: types.FrameType | None, last: types.FrameType | None = None,
             ) -> tuple[str, str]:
    """Return where a call stands in the source, innermost frame outside of torch first.

    Args:
        frame: the call's frame.
        last: the forward's frame; None: up to the first frame of this package.

    Returns:
        File and line, to be read; and the place relative to each function's own first line, which
        stays what it is when the file is edited elsewhere.
    """
    where, places = "", []
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        ours = file.startswith(_HERE)
        if frame is last or (last is None and ours):
            break
        line, column = _position(code, frame.f_lasti)
        frame = frame.f_back
        if ours or file == "<string>" or (file.startswith(_TORCH)
                                          and not file.startswith(_TORCH_MODULES)):
            continue
        if file == _MODULE_FILE:  # the way into a forward
            continue
        where = where or f"{_short(file)}:{line}"
        if not code.co_name.startswith("<") or code.co_name == "<lambda>":
            places.append(f"{code.co_name}+{line - code.co_firstlineno}:{column}")
    return where, "<".join(places)


@functools.lru_cache(4096)
def _position(code: types.CodeType, instruction: int) -> tuple[int, int]:
    """Return line and column of an instruction: two calls on one line are two places."""
    position = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    line, _, column, _ = position or (None, None, None, None)
    return line or code.co_firstlineno, column or 0


def _short(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])


class Variant(NamedTuple):
    """Name one choice that a graph must make: the mode, and which optional arguments are what.

    Attributes:
        training: the mode.
        static: optional arguments held at plain values (None, numbers, text), sorted by name;
            all others are inputs of the graph.
    """

    training: bool
    static: tuple[tuple[str, Any], ...] = ()


class Traced(NamedTuple):
    """Hold a forward's graph, and what goes with it.

    Attributes:
        constants: tensors that the forward made up and wants as attributes.
        by_mode: whether the forward asked for its mode.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    by_mode: bool


class _Mode:
    """Stand in for a module's ``training``, noting whether anybody asks."""

    def __init__(self, training: bool) -> None:
        self.training, self.asked = training, False

    def __get__(self, module: nn.Module, cls: type[nn.Module]) -> bool:
        self.asked = True
        return self.training

    def __set__(self, module: nn.Module, value: Any) -> None:
        raise fx.proxy.TraceError("forward sets self.training, which a graph cannot hold")


def optional_arguments(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the optional arguments of forward and their defaults."""
    return {p.name: p.default for p in inspect.signature(cls.forward).parameters.values()
            if p.default is not p.empty}


def is_plain(value: Any) -> bool:
    """Return whether an argument is a plain value, which a graph holds as a constant."""
    return value is None or isinstance(value, (bool, int, float, str)) or (
        isinstance(value, tuple) and all(map(is_plain, value)))


def variant_of(cls: type[nn.Module], training: bool, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Variant:
    """Return the variant that a call of forward wants."""
    bound = inspect.signature(cls.forward).bind(None, *args, **kwargs).arguments
    values = {name: bound.get(name, default) for name, default in optional_arguments(cls).items()}
    return Variant(training, tuple(sorted((k, v) for k, v in values.items() if is_plain(v))))


def inputs_of(cls: type[nn.Module], variant: Variant, args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return what a variant's graph is called with: the arguments that are not held."""
    signature = inspect.signature(cls.forward)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    held = dict(variant.static)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.name in held:
            continue
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            positional.append(value)
    return positional, named


def _held_at(cls: type[nn.Module], variant: Variant, mode: _Mode) -> type[nn.Module]:
    """Return a subclass of cls in that mode, whose forward lacks what the variant holds.

    torch.fx's own concrete_args renames arguments, asserts on them, and takes no tuples.
    """
    held = dict(variant.static)
    body = {"training": mode, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if not held:
        return type(cls.__name__, (cls,), body)
    taken, passed, star = ["self"], ["self"], False
    for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:
        name = parameter.name
        mark = "*" * (parameter.kind is parameter.VAR_POSITIONAL) \
            + "**" * (parameter.kind is parameter.VAR_KEYWORD)
        value = f"_held[{name!r}]" if name in held else mark + name
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        passed.append(f"{name}={value}" if keyword else value)
        if name not in held:
            if keyword and not star:
                taken.append("*")
            taken.append(mark + name)
        star = star or keyword or mark == "*"
    space: dict[str, Any] = {"_held": held, "_forward": cls.forward}
    exec(f"def forward({', '.join(taken)}): return _forward({', '.join(passed)})", space)
    return type(cls.__name__, (cls,), body | {"forward": space["forward"]})


def planned_variants(cls: type[nn.Module]) -> list[Variant]:
    """Return the variants of a plan: both modes, optional arguments left out or given."""
    defaults = optional_arguments(cls)
    left_out = tuple(sorted((k, v) for k, v in defaults.items() if is_plain(v)))
    variants = [Variant(False, left_out), Variant(True, left_out)]
    given = tuple((k, v) for k, v in left_out if v is not None)
    return variants if given == left_out else [*variants, Variant(False, given),
                                               Variant(True, given)]


def trace(module: nn.Module, cls: type[nn.Module], variant: Variant,
          hidden: Iterable[str] = ()) -> Traced:
    """Trace one variant of the forward of cls on module, without touching module.

    Raises:
        Exception: whatever torch.fx or the forward raises on symbolic values.
    """
    mode = _Mode(variant.training)
    probe = object.__new__(_held_at(cls, variant, mode))
    probe.__dict__.update({k: _copied(v) for k, v in module.__dict__.items() if k != "training"})
    children = probe.__dict__["_modules"]
    for name in hidden:
        children.pop(name, None)
    met: dict[int, Any] = {}
    children.update({name: _stand_in(child, met) for name, child in children.items()})
    separate_aliases(children)
    before = {k: _copied(v) for k, v in probe.__dict__.items()}
    with torch.random.fork_rng(devices=[]):
        dice = torch.get_rng_state(), random.getstate()
        numpy_dice = numpy.random.get_state()
        with checkpoints_inlined(), _switches_unreadable():
            graph = Tracer().trace(probe)
        rolled = not torch.equal(dice[0], torch.get_rng_state()) \
            or dice[1] != random.getstate() or not all(
                numpy.array_equal(a, b) for a, b in zip(numpy_dice, numpy.random.get_state(),
                                                        strict=True))
        random.setstate(dice[1])
        numpy.random.set_state(numpy_dice)
    if rolled:
        raise fx.proxy.TraceError("random numbers, which a graph would hold as constants")
    changed = [k for k, v in before.items() if not _same(v, probe.__dict__.get(k))]
    constants = {k: v for k, v in probe.__dict__.items() if k not in before}
    changed += [k for k, v in constants.items() if not isinstance(v, torch.Tensor)]
    if changed:
        raise fx.proxy.TraceError(f"forward sets self.{changed[0]}, which a graph cannot hold")
    return Traced(graph, constants, mode.asked)


def _stand_in(module: nn.Module | None, seen: dict[int, Any]) -> Any:
    """Return a child as the user's forward may see it.

    Its mode, which no graph holds, is missing; one that is rewritten has the user's own class.
    """
    if module is None or id(module) in seen:
        return module if module is None else seen[id(module)]
    twin = object.__new__(getattr(type(module), "_user_class", type(module)))
    seen[id(module)] = twin
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k != "training"})
    twin.__dict__["_modules"] = {name: _stand_in(child, seen)
                                 for name, child in module.__dict__.get("_modules", {}).items()}
    return twin


@contextlib.contextmanager
def _switches_unreadable() -> Iterator[None]:
    """Refuse a forward that asks for modes which its graph would hold as they are now."""
    def unreadable(name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_code.co_filename.startswith((_TORCH, _HERE)):
                raise fx.proxy.TraceError(f"it asks torch.{name}(), which a graph would hold")
            return _SWITCHES[name](*args, **kwargs)
        return ask

    try:
        for name in _SWITCHES:
            setattr(torch, name, unreadable(name))
        yield
    finally:
        for name, function in _SWITCHES.items():
            setattr(torch, name, function)


def _copied(value: Any) -> Any:
    """Return a shallow copy of what a forward might fill: it must not be the user's."""
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _same(one: Any, two: Any) -> bool:
    """Return whether a forward left an attribute as it was."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(
            two[k] is v for k, v in one.items())
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(
            a is b for a, b in zip(one, two, strict=True))
    return one == two if isinstance(one, set) else one is two


def separate_aliases(children: dict[str, Any]) -> None:
    """Give an activation that stands under several names of one parent an object for each.

    They have no state, and torch.fx knows a child by its object.
    """
    seen: set[int] = set()
    for name, child in children.items():
        if type(child) in MODULE_KINDS and id(child) in seen:
            children[name] = copy.copy(child)
        seen.add(id(child))


def planned_graphs(module: nn.Module, cls: type[nn.Module] | None = None,
                   hidden: Iterable[str] = ()) -> dict[Variant, Traced]:
    """Trace the planned variants; cls where module's class is not the user's.

    Both modes share the graph of a forward that never asks for its mode.

    Children named in hidden are ours: a forward that goes through its children must not see them.

    Raises:
        Exception: a variant with optional arguments left out cannot be traced.
    """
    cls = cls or type(module)
    graphs: dict[Variant, Traced] = {}

    def add(variant: Variant) -> None:
        other = graphs.get(variant._replace(training=not variant.training))
        graphs[variant] = trace(module, cls, variant, hidden) if other is None or other.by_mode \
            else other

    first, second, *given = planned_variants(cls)
    add(first)
    add(second)
    for variant in given:
        # Given, an optional argument may be anything: what cannot be traced now is tried again
        # when a caller gives it.
        with contextlib.suppress(Exception):
            add(variant)
    return graphs
