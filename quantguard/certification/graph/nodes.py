"""What a node of a model's graph calls: its name for the user, and its rule."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..rules import RULES, Rule

# The name of the user's model in the graph's root.
_PREFIX = "model."
# Methods that read a shape: they are called as they are, on any tensor of that shape.
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel"}


def attribute(root: Any, name: str) -> Any:
    """Return what a get_attr node reads."""
    for part in name.split("."):
        root = getattr(root, part)
    return root


def node_name(root: nn.Module, node: fx.Node) -> str:
    """Return a node's name for the user: the layer's name, or the function and its place."""
    if node.op == "call_module":
        return f"{layer_name(node)} ({type(root.get_submodule(str(node.target))).__name__})"
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    where = node.meta.get("where")
    return f"{name} at {where}" if where else name


def layer_name(node: fx.Node) -> str:
    """Return the name that a layer has in the user's model."""
    return str(node.target).removeprefix(_PREFIX)


def rule_for(root: nn.Module, node: fx.Node) -> Rule | None:
    """Return the rule of the operation that a node calls; None where there is none."""
    if node.op == "call_module":
        return RULES.get(type(root.get_submodule(str(node.target))))
    if node.op == "call_method":
        return RULES.get(str(node.target))
    target = node.target
    full_name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return RULES.get(target) or RULES.get(full_name)


def is_shape_query(node: fx.Node) -> bool:
    """Return whether a node's value is a number, shape or dtype read from a tensor."""
    if node.op == "call_method" and node.target in _SHAPE_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return bool(node.all_input_nodes) and node.op == "call_function" \
        and all(map(is_shape_query, node.all_input_nodes))
