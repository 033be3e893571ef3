"""What a node of a model's flat graph calls: its name for the user, and its rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from .rules import FUNCTIONS, METHODS, MODULES, WRAPPED

# The name of the user's model in the graph's root.
_PREFIX = "model."
# What asks for shapes is carried out as it is: only where all it is given is known.
_ASKS = {"size", "dim", "ndimension", "numel"}


def attribute(root: Any, name: str) -> Any:
    """Return what a get_attr node reads."""
    for part in name.split("."):
        root = getattr(root, part)
    return root


def node_name(root: nn.Module, node: fx.Node) -> str:
    """Return a node as the user knows it: the layer's name, or the function and its place."""
    if node.op == "call_module":
        return f"{layer_name(node)} ({type(root.get_submodule(str(node.target))).__name__})"
    target = node.target
    called = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    where = node.meta.get("where")
    return f"{called}" + f" at {where}" * bool(where)


def layer_name(node: fx.Node) -> str:
    """Return the name that a layer has in the user's model."""
    return str(node.target).removeprefix(_PREFIX)


def plain_rule(root: nn.Module, node: fx.Node) -> Callable[..., Any] | None:
    """Return the rule of a node as it stands by itself; None where there is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        rule = MODULES.get(type(module))
        return None if rule is None else lambda *args, **settings: rule(module, *args, **settings)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    target = node.target
    full_name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return FUNCTIONS.get(target) or WRAPPED.get(full_name)


def asked(node: fx.Node) -> bool:
    """Return whether a node is a number or shape that the graph asked for, not a tensor."""
    if node.op == "call_method" and node.target in _ASKS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return bool(node.all_input_nodes) and node.op == "call_function" \
        and all(map(asked, node.all_input_nodes))
