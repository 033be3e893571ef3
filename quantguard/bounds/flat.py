"""The whole model as one flat graph of operations that have rules.

Conversion leaves the user's model as it is; what is certified is a graph of a copy in eval mode,
traced by torch.fx through everything but torch's own layers and staircases.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..activation import QuantActivation
from ..errors import ConversionError
from ..running import checkpoints_inlined, evaluating, seeded
from ..spec import Threat
from ..state import carried
from .arithmetic import normed
from .nodes import asked, attribute, layer_name, node_name, plain_rule
from .rules import LAYERS, NORMS
from .settling import settle
from .traced import Whole, traced
from .watched import compared

# What computes otherwise in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
# Images that the model and its graph are run on, side by side.
_WATCHED = 2
# Operations without a rule that one error names.
_NAMED = 8


class Flat:
    """Hold the graph and the copy of the model whose parameters it names.

    Attributes:
        root: the copy; names in the graph are its.
        nodes: those that the output depends on, in the order in which they run.
        last_use: for each node, the nodes whose values nobody reads after it.
        normed: the nodes of linear and convolutional layers that a BatchNorm alone reads.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        needed: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node.op in ("placeholder", "output") or node in needed:
                needed |= {node, *node.all_input_nodes}
        self.nodes = [node for node in graph.nodes if node in needed]
        seen: set[fx.Node] = set()
        self.last_use: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(self.nodes):
            self.last_use[node] = [x for x in node.all_input_nodes if x not in seen]
            seen |= set(node.all_input_nodes)
        self.normed: set[Any] = {
            node.args[0] for node in self.nodes if self._calls(node, NORMS)
            and self._calls(node.args[0], LAYERS) and len(node.args[0].users) == 1}

    def _calls(self, node: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_module" \
            and len(node.args) == 1 and not node.kwargs and type(self.module(node)) in kinds

    def digest(self) -> str:
        """Return a hash of all operations and of all numbers that they may use."""
        found = hashlib.blake2b(digest_size=16)
        for node in self.nodes:
            found.update(f"{node.format_node()}\n".encode())
            if node.op == "call_module":
                found.update(f"{_settings(self.module(node))}\n".encode())
        held = {**self.root.state_dict(), **{
            str(node.target): attribute(self.root, str(node.target)) for node in self.nodes
            if node.op == "get_attr"}}
        for name, value in sorted(held.items()):
            found.update(name.encode())
            if isinstance(value, Tensor):
                found.update(f"{value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def module(self, node: fx.Node) -> nn.Module:
        """Return the layer that a call_module node calls."""
        return self.root.get_submodule(str(node.target))

    def staircase(self, node: fx.Node) -> str | None:
        """Return the name of the staircase that a node calls; None for other nodes."""
        if node.op != "call_module" or not isinstance(self.module(node), QuantActivation):
            return None
        return layer_name(node)


def _settings(module: nn.Module) -> list[Any]:
    """Return what a layer computes by, but for its tensors: not all of it is in its repr."""
    held = vars(module)
    found: list[Any] = [type(module).__qualname__, sorted(
        (name, value) for name, value in held.items() if name != "training" and _is_plain(value))]
    if isinstance(module, QuantActivation):
        found += [module.spec, module._state.action, module._state.bits,
                  _settings(module.function)]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def flattened(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> Flat:
    """Trace a model into one graph from pixels to logits.

    Args:
        model: its mode is put back; nothing else of it is changed but by its own forward.
        threat: mean and std.
        key: the keyword under which the model eats images; None: its first argument.
        pixels: (N, ...), for their shape.

    Raises:
        ConversionError: a forward that torch.fx cannot trace, layers without a rule (all of them
            at once), parameters that are not float32, or a forward that does to images what its
            graph does not, or takes values out of them.
    """
    kind = type(model).__name__
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ConversionError(f"{name} is {value.dtype}",
                                  why="A certificate is for the model that runs in float32.",
                                  fix="Certify model.float(), and run that.")
    root, graph = traced(model, threat, key, pixels)
    whole = Whole(model, threat, key, pixels)  # itself: a copy may be made to be another one
    few = pixels[:_WATCHED]
    more, named = torch.cat([few, few[:1]]).flip(-1), functools.partial(node_name, root)
    try:
        with evaluating(whole), checkpoints_inlined():  # as the tracer has them
            different = compared(whole, root, graph, few, named)
            with torch.no_grad(), seeded(0):
                different = different or carried(model, lambda: whole(few.clone()))
            # later, of other images, of another number, and where gradients are wanted
            different = different or compared(whole, root, graph, more, named, grad=True)
    except Exception as error:  # whatever the forward raises
        said = str(error).strip().splitlines() or [type(error).__name__]
        different = f"It says: {said[0]}"
    settle(root, graph)
    flat = Flat(root, graph)
    _check(flat)
    if different is not None:
        raise ConversionError(f"the forward of {kind} does not compute what its graph says",
                              why=different,
                              fix="A certificate needs a forward that neither branches on values, "
                                  "nor asks whether it is given tensors, nor changes with calls.")
    return flat


def rule_of(flat: Flat, node: fx.Node) -> Callable[..., Any] | None:
    """Return the rule of a node; None where there is none."""
    layer = node.args[0] if node.args else None
    if isinstance(layer, fx.Node) and layer in flat.normed:
        return functools.partial(normed, flat.module(layer), flat.module(node))
    return plain_rule(flat.root, node)


def _check(flat: Flat) -> None:
    """Refuse, all at once, layers without a rule, and layers that hooks may change.

    Raises:
        ConversionError: there are some.
    """
    problems: dict[str, None] = {}
    fed = {node: node.op == "placeholder" for node in flat.nodes}
    for node in flat.nodes:
        fed[node] = fed[node] or any(fed[x] for x in node.all_input_nodes)
        if node.op not in ("call_module", "call_function", "call_method") or not fed[node]:
            continue
        if asked(node) or all(asked(x) for x in node.all_input_nodes if fed[x]):
            continue
        if rule_of(flat, node) is None:
            problems[node_name(flat.root, node)] = None
        elif node.op == "call_module":
            for wrong in _odd(flat.module(node)):
                problems[f"{node_name(flat.root, node)}, {wrong}"] = None
    if problems:
        several = f"{len(problems)} operations have" if len(problems) > 1 else "one operation has"
        named = list(problems)[:_NAMED]
        more = f" and {len(problems) - _NAMED} more" * (len(problems) > _NAMED)
        raise ConversionError(f"no certificate: {several} no rule: {', '.join(named)}{more}",
                              why="A bound through an unknown operation would be a guess.",
                              fix="See quantguard.certify for those that are.")


def _odd(module: nn.Module) -> Iterator[str]:
    """Yield what makes a layer another one than its rule is for."""
    every = torch.nn.modules.module  # where hooks of all modules are
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) \
            or every._global_forward_hooks or every._global_forward_pre_hooks:
        yield "which has hooks or its own forward"
    if module.training and isinstance(module, _MODAL):
        yield "which stays in training mode"
    if isinstance(module, QuantActivation):
        t = module.thresholds
        if not bool((t[..., 1:] > t[..., :-1]).all()):
            yield "whose thresholds do not ascend"
