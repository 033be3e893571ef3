"""A traced graph made plain: arguments where rules expect them, writes followed to readers."""

from __future__ import annotations

import inspect
import operator

from torch import fx, nn

from ..activation import QuantActivation
from ..errors import ConversionError
from ..kinds import overwrites
from .nodes import node_name, plain_rule

# What may give its input back as it is, or a window into it.
_VIEWS = {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "split",
          "chunk", "contiguous", "detach", "float", "to", "getitem", "dropout", "dropout2d",
          "stochastic_depth"}
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
                 nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Names that torch has for what rules take by position, and for what they take by another name.
_POSITIONS = {"input": 0, "tensor": 0, "x": 0, "a": 0, "x1": 0, "other": 1, "x2": 1, "dims": 1,
              "size": 1, "shape": 1, "split_size": 1, "split_size_or_sections": 1}
_NAMES = {"axis": "dim", "keepdims": "keepdim"}


def settle(root: nn.Module, graph: fx.Graph) -> None:
    """Rewrite a graph so that each value is what the node that is named computes.

    Raises:
        ConversionError: it writes over what is read again elsewhere, or over the images.
    """
    _settle_names(root, graph)
    _drop_unread_values(root, graph)
    _settle_writes(root, graph)


def _settle_names(root: nn.Module, graph: fx.Graph) -> None:
    """Give what rules know by its position there, where a call gave it by name."""
    for node in graph.nodes:
        if not node.kwargs or plain_rule(root, node) is None:
            continue
        if node.op == "call_module":
            forward = inspect.signature(root.get_submodule(node.target).forward)
            bound = forward.bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
            continue
        settings = {_NAMES.get(name, name): value for name, value in node.kwargs.items()}
        for name, at in sorted(_POSITIONS.items(), key=lambda item: item[1]):
            if name in settings and len(node.args) == at:
                node.args = (*node.args, settings.pop(name))
        node.kwargs = settings


def _drop_unread_values(root: nn.Module, graph: fx.Graph) -> None:
    """Take a float activation's result away from staircases that do not read it."""
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 2:
            module = root.get_submodule(node.target)
            if isinstance(module, QuantActivation) and module.absorbs \
                    and module._state.action == "quantize":
                node.args = node.args[:1]


def _settle_writes(root: nn.Module, graph: fx.Graph) -> None:
    """Let what is read after an overwriting call read its result.

    Raises:
        ConversionError: what it overwrites is read again through another view, or is the input.
    """
    order: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # node -> the first node that gave out the same memory
    for node, at in order.items():
        source = _source(root, node)
        writes = source is not None and _overwrites(root, node)
        shares = source is not None and (writes or _is_view(root, node))
        memory[node] = memory[source] if source is not None and shares else node
        if not writes or source is None:
            continue
        twins = [other for other in memory if other not in (source, node)
                 and memory[other] is memory[source]]
        if memory[source].op == "placeholder":
            raise ConversionError(f"{node_name(root, node)} writes over the images it is given",
                                  fix="Use the form that does not work in place.")
        if memory[source].op == "get_attr" or any(
                order[user] > at for twin in twins for user in twin.users):
            raise ConversionError(
                f"{node_name(root, node)} writes over what is read again elsewhere",
                fix="Use the form that does not work in place.")
        for user in [user for user in source.users if order[user] > at]:
            user.replace_input_with(source, node)


def _source(root: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return whose memory a call writes into, or gives out again, where it does either."""
    given = node.all_input_nodes
    # A staircase in float gives the activation's value out, where the model computes it itself.
    at = int(len(given) > 1 and _gives_back(root, node))
    return given[at] if given else None


def _gives_back(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a call is that of a staircase whose result is what it was given."""
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    return isinstance(module, QuantActivation) and module.in_float and not module.inplace \
        and (len(node.args) > 1 or isinstance(module.function, _VIEW_MODULES))


def _overwrites(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a call writes into the first tensor that it is given.

    Raises:
        ConversionError: it writes into another one, or into a part of one.
    """
    if node.kwargs.get("out") is not None or node.target in ("__setitem__", operator.setitem):
        raise ConversionError(f"{node_name(root, node)} writes into a tensor that is there",
                              fix="Use the form that does not work in place.")
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    return overwrites(node.target, node.args, node.kwargs)


def _is_view(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return isinstance(module, _VIEW_MODULES) or _gives_back(root, node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # what has no rule may be a view, for all that is known
    return node.op in ("call_function", "call_method") and (
        name in _VIEWS or plain_rule(root, node) is None)
