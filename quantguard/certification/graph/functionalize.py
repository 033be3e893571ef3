"""Rewriting of a traced graph: positional arguments where rules expect them, no in-place writes."""

from __future__ import annotations

import inspect
import operator

from torch import fx, nn

from ...core.errors import ConversionError
from ...nn.activation_kinds import overwrites
from ...nn.quant_activation import QuantActivation
from ..rules import RULES
from .nodes import node_name, rule_for

# torch's keywords for arguments that rules take by position, and those that rules call otherwise.
_POSITIONS = {"input": 0, "tensor": 0, "x": 0, "a": 0, "x1": 0, "other": 1, "x2": 1, "dims": 1,
              "size": 1, "shape": 1, "split_size": 1, "split_size_or_sections": 1}
_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def functionalize(root: nn.Module, graph: fx.Graph) -> None:
    """Rewrite a graph in place so that every node's value is what its name says, also later on.

    Raises:
        ConversionError: it writes over the images, or over what is read again elsewhere.
    """
    _make_positional(root, graph)
    _drop_unread_values(root, graph)
    _redirect_readers_of_writes(root, graph)


def _make_positional(root: nn.Module, graph: fx.Graph) -> None:
    """Move keyword arguments to the positions where rules expect them."""
    for node in graph.nodes:
        if not node.kwargs or rule_for(root, node) is None:
            continue
        if node.op == "call_module":
            forward = inspect.signature(root.get_submodule(node.target).forward)
            bound = forward.bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
            continue
        kwargs = {_NAMES.get(name, name): value for name, value in node.kwargs.items()}
        for name, position in sorted(_POSITIONS.items(), key=lambda item: item[1]):
            if name in kwargs and len(node.args) == position:
                node.args = (*node.args, kwargs.pop(name))
        node.kwargs = kwargs


def _drop_unread_values(root: nn.Module, graph: fx.Graph) -> None:
    """Remove the float activation's result from calls of quantizers that do not read it."""
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 2:
            module = root.get_submodule(node.target)
            if isinstance(module, QuantActivation) and module.absorbs \
                    and module._state.action == "quantize":
                node.args = node.args[:1]


def _redirect_readers_of_writes(root: nn.Module, graph: fx.Graph) -> None:
    """Make every later reader of an overwritten tensor read the call that overwrote it.

    Raises:
        ConversionError: another view of that tensor is read later, or it is the input or a
            parameter.
    """
    order: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # node -> the first node that returned the same memory
    for node, at in order.items():
        source = _source(root, node)
        writes = source is not None and _overwrites(root, node)
        shares = source is not None and (writes or _is_view(root, node))
        memory[node] = memory[source] if source is not None and shares else node
        if not writes or source is None:
            continue
        views = [other for other in memory if other not in (source, node)
                 and memory[other] is memory[source]]
        if memory[source].op == "placeholder":
            raise ConversionError(f"{node_name(root, node)} writes over the input images",
                                  fix="Use the form that does not work in place.")
        if memory[source].op == "get_attr" or any(
                order[user] > at for view in views for user in view.users):
            raise ConversionError(
                f"{node_name(root, node)} writes over what is read again elsewhere",
                fix="Use the form that does not work in place.")
        for user in [user for user in source.users if order[user] > at]:
            user.replace_input_with(source, node)


def _source(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the node whose memory a call may write into or return."""
    inputs = node.all_input_nodes
    # A quantizer in float returns the activation's value, if the model computes that itself.
    at = int(len(inputs) > 1 and _returns_its_input(root, node))
    return inputs[at] if inputs else None


def _returns_its_input(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node calls a quantizer that returns its input as it is."""
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    return isinstance(module, QuantActivation) and module.in_float and not module.inplace \
        and (len(node.args) > 1 or _may_return_its_input(module.function))


def _overwrites(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a call writes into its first tensor argument.

    Raises:
        ConversionError: it writes into another one, or into a part of one.
    """
    if node.kwargs.get("out") is not None or node.target in ("__setitem__", operator.setitem):
        raise ConversionError(f"{node_name(root, node)} writes into an existing tensor",
                              fix="Use the form that does not work in place.")
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    return overwrites(node.target, node.args, node.kwargs)


def _is_view(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a call may return its first argument, or a view of it."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return _may_return_its_input(module) or _returns_its_input(root, node)
    rule = rule_for(root, node)
    # an operation without a rule may return a view
    return node.op in ("call_function", "call_method") and (rule is None or rule.view)


def _may_return_its_input(layer: nn.Module) -> bool:
    rule = RULES.get(type(layer))
    return rule is not None and rule.view
