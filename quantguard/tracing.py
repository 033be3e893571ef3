"""Trace one module's own forward with torch.fx, and find the activation calls in it."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
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
        if frame is not None and not frame.f_code.co_filename.endswith("sites.py"):
            node.meta["where"] = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"
        return node


def _short(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])


class Traced(NamedTuple):
    """Hold a forward's graph, and the tensors that it made up and wants as attributes."""

    graph: fx.Graph
    constants: dict[str, torch.Tensor]


def trace(module: nn.Module, cls: type[nn.Module], training: bool) -> Traced:
    """Trace the forward of cls on module in the given mode, without touching module.

    Raises:
        Exception: whatever torch.fx or the forward raises on symbolic values.
    """
    # A shallow copy: attributes that tracing sets must not appear on the user's module.
    probe = object.__new__(cls)
    probe.__dict__.update(module.__dict__)
    probe.__dict__["training"] = training
    optional = {p.name: p.default for p in inspect.signature(cls.forward).parameters.values()
                if p.default is not p.empty}
    with torch.random.fork_rng(devices=[]):
        graph = Tracer().trace(probe, optional or None)
    # torch.fx renames arguments that it traced at their defaults; callers know the real names.
    names = [p for p in inspect.signature(cls.forward).parameters if p != "self"]
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=False):
        if not node.target.startswith("*"):
            node.target = name
    constants = {k: v for k, v in probe.__dict__.items() if k not in module.__dict__}
    return Traced(graph, constants)


def both_graphs(module: nn.Module, cls: type[nn.Module] | None = None) -> dict[bool, Traced]:
    """Trace train (True) and eval (False) mode; cls where module's class is not the user's."""
    return {mode: trace(module, cls or type(module), mode) for mode in (False, True)}


@dataclass(frozen=True)
class Call:
    """Hold one activation call found in a graph."""

    node: fx.Node
    kind: str
    form: str
    target: str
    number: int
    function: nn.Module
    name: str


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
    """Return the activation calls of a graph in order, each with the name of its staircase.

    A module's first call keeps the module's own name; later calls and functions get a name of
    their own, which depends on their order only.
    """
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
        key = ("module", target) if target else ("kind", kind)
        counts[key] = number = counts.get(key, 0) + 1
        name = target
        if not target or number > 1:
            stem = target.replace(".", "_") if target else kind
            name = f"{stem}_{number}" if number > 1 else stem
            while hasattr(module, name) and not isinstance(getattr(module, name), QuantActivation):
                name += "_q"
        found.append(Call(node, kind, form, target, number, function, name))
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


def merged_calls(graphs: dict[bool, fx.Graph], module: nn.Module) -> list[Call]:
    """Return the calls of both modes, eval first: the same name is the same site."""
    merged: dict[str, Call] = {}
    for mode in (False, True):
        for call in calls_in(module, graphs[mode]):
            merged.setdefault(call.name, call)
    return list(merged.values())
