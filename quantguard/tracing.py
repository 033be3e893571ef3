"""Trace one module's own forward with torch.fx, and find the activation calls in it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activation import QuantActivation

# kind -> (module class, functions, method names). A literal table: one row an activation.
_KINDS: dict[str, tuple[type[nn.Module], tuple[Callable[..., Any], ...], tuple[str, ...]]] = {
    "relu": (nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "relu6": (nn.ReLU6, (F.relu6,), ()),
    "leaky_relu": (nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), ()),
    "elu": (nn.ELU, (F.elu, F.elu_), ()),
    "selu": (nn.SELU, (F.selu, F.selu_, torch.selu, torch.selu_), ()),
    "celu": (nn.CELU, (F.celu, F.celu_, torch.celu, torch.celu_), ()),
    "gelu": (nn.GELU, (F.gelu,), ()),
    "silu": (nn.SiLU, (F.silu,), ()),
    "mish": (nn.Mish, (F.mish,), ()),
    "hardswish": (nn.Hardswish, (F.hardswish,), ()),
    "hardtanh": (nn.Hardtanh, (F.hardtanh, F.hardtanh_), ()),
    "softplus": (nn.Softplus, (F.softplus,), ()),
    "softsign": (nn.Softsign, (F.softsign,), ()),
    "tanh": (nn.Tanh, (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
    "sigmoid": (nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_), ("sigmoid", "sigmoid_")),
    "hardsigmoid": (nn.Hardsigmoid, (F.hardsigmoid,), ()),
}
KIND_OF_CLASS = {row[0]: kind for kind, row in _KINDS.items()}
KIND_OF_FUNCTION = {f: kind for kind, row in _KINDS.items() for f in row[1]}
KIND_OF_METHOD = {name: kind for kind, row in _KINDS.items() for name in row[2]}
GATES = ("sigmoid", "hardsigmoid")


class Tracer(fx.Tracer):
    """Trace one forward with every child a leaf, noting where calls stand in the source."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        now = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
               torch.is_autocast_enabled("cuda"))
        if getattr(self, "_modes", now) != now:
            raise fx.proxy.TraceError("a no_grad or autocast block, which a graph cannot hold")
        self._modes = now
        node = super().create_node(*args, **kwargs)
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and "/torch/" in frame.f_code.co_filename.replace("\\", "/") \
                and "/modules/" not in frame.f_code.co_filename.replace("\\", "/"):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename != __file__:
            node.meta["where"] = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        return node


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
    """Hold a forward's graph, and the tensors that it made up and wants as attributes."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


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


def _held_at(cls: type[nn.Module], variant: Variant) -> type[nn.Module]:
    """Return cls, or a subclass whose forward lacks the arguments that the variant holds.

    torch.fx's own concrete_args renames arguments, asserts on them, and takes no tuples.
    """
    held = dict(variant.static)
    if not held:
        return cls
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
    return type(cls.__name__, (cls,), {"forward": space["forward"], "__module__": cls.__module__})


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
    probe = object.__new__(_held_at(cls, variant))
    probe.__dict__.update({k: _copied(v) for k, v in module.__dict__.items()})
    probe.__dict__["training"] = variant.training
    children = probe.__dict__["_modules"]
    for name in hidden:
        children.pop(name, None)
    separate_aliases(children)
    before = {k: _copied(v) for k, v in probe.__dict__.items()}
    with torch.random.fork_rng(devices=[]):
        dice = torch.get_rng_state(), random.getstate()
        graph = Tracer().trace(probe)
        rolled = not torch.equal(dice[0], torch.get_rng_state()) or dice[1] != random.getstate()
        random.setstate(dice[1])
    if rolled:
        raise fx.proxy.TraceError("random numbers, which a graph would hold as constants")
    changed = [k for k, v in before.items() if not _same(v, probe.__dict__.get(k))]
    constants = {k: v for k, v in probe.__dict__.items() if k not in before}
    changed += [k for k, v in constants.items() if not isinstance(v, torch.Tensor)]
    if changed:
        raise fx.proxy.TraceError(f"forward sets self.{changed[0]}, which a graph cannot hold")
    return Traced(graph, constants)


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
        if type(child) in KIND_OF_CLASS and id(child) in seen:
            children[name] = copy.copy(child)
        seen.add(id(child))


def planned_graphs(module: nn.Module, cls: type[nn.Module] | None = None,
                   hidden: Iterable[str] = ()) -> dict[Variant, Traced]:
    """Trace the planned variants; cls where module's class is not the user's.

    Children named in hidden are ours: a forward that goes through its children must not see them.

    Raises:
        Exception: a variant with optional arguments left out cannot be traced.
    """
    cls = cls or type(module)
    first, second, *given = planned_variants(cls)
    graphs = {variant: trace(module, cls, variant, hidden) for variant in (first, second)}
    for variant in given:
        # Given, an optional argument may be anything: what cannot be traced now is tried again
        # when a caller gives it.
        with contextlib.suppress(Exception):
            graphs[variant] = trace(module, cls, variant, hidden)
    return graphs


Identity = tuple[str, str, int]
"""What makes a call the same in every graph of a forward: called, file and line, how many-th."""


@dataclass(frozen=True)
class Call:
    """Hold one activation call found in a graph."""

    node: fx.Node
    kind: str
    form: str
    target: str
    function: nn.Module
    identity: Identity


def float_module(kind: str, node: fx.Node) -> nn.Module | None:
    """Return the activation of a function or method call as a module; None if args vary."""
    cls = _KINDS[kind][0]
    names = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    values = dict(zip(names, node.args[1:], strict=False)) | {
        k: v for k, v in node.kwargs.items() if k in names}
    if any(isinstance(v, fx.Node) for v in values.values()):
        return None
    return cls(**values)


def writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether an activation call overwrites its input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    position = {"relu": 1, "relu6": 1, "leaky_relu": 2, "elu": 2, "selu": 1, "celu": 2, "silu": 1,
                "mish": 1, "hardswish": 1, "hardtanh": 3, "hardsigmoid": 1}.get(name, 99)
    flag = node.args[position] if len(node.args) > position else node.kwargs.get("inplace", False)
    return name.endswith("_") or bool(flag)


def calls_in(module: nn.Module, graph: fx.Graph) -> list[Call]:
    """Return the activation calls of a graph in order."""
    found: list[Call] = []
    counts: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        function: nn.Module | None
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            # A staircase stands for the activation that it follows: graphs can be had again later.
            function = child.function if isinstance(child, QuantActivation) else child
            kind, form, target = KIND_OF_CLASS.get(type(function)), "module", str(node.target)
        elif node.op == "call_function":
            kind, form, target = KIND_OF_FUNCTION.get(node.target), "function", ""
            function = float_module(kind, node) if kind else None
        elif node.op == "call_method":
            kind, form, target = KIND_OF_METHOD.get(str(node.target)), "method", ""
            function = float_module(kind, node) if kind else None
        else:
            continue
        if kind is None or function is None:
            continue
        key = (target or f"{kind}()", node.meta.get("where", ""))
        counts[key] = counts.get(key, 0) + 1
        found.append(Call(node, kind, form, target, function, (*key, counts[key])))
    return found


def is_gate(node: fx.Node) -> bool:
    """Return whether what the node computes multiplies something."""
    for user in node.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if name in ("mul", "mul_", "imul"):
            return True
        if name in ("view", "reshape", "unsqueeze", "expand", "expand_as", "permute", "chunk",
                    "getitem", "split", "flatten", "view_as") and is_gate(user):
            return True
    return False


class Named(NamedTuple):
    """Hold a call, the name of its staircase in the module, and how many-th of its kind it is."""

    call: Call
    name: str
    number: int


def named_calls(module: nn.Module, graphs: Iterable[fx.Graph]) -> list[Named]:
    """Return the calls of all graphs of a forward, each once.

    A module's first call keeps the module's own name; later calls and functions get a name of
    their own.
    """
    named: dict[Identity, Named] = {}
    counts: dict[str, int] = {}
    for graph in graphs:
        for call in calls_in(module, graph):
            if call.identity in named:
                continue
            key = call.identity[0]
            counts[key] = number = counts.get(key, 0) + 1
            name = call.target
            if not call.target or number > 1:
                stem = call.target.replace(".", "_") if call.target else call.kind
                name = f"{stem}_{number}" if number > 1 else stem
                while hasattr(module, name):
                    name += "_q"
            named[call.identity] = Named(call, name, number)
    return list(named.values())
