"""One graph of a whole model, whose operations all have rules.

It is the graph of a copy in eval mode, traced by torch.fx through everything but torch's own layers
and quantizers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...core.errors import ConversionError
from ...core.forward_state import carried
from ...core.model_calls import checkpoints_inlined
from ...core.module_utils import evaluating
from ...core.runtime import seeded
from ...core.specs import Threat
from ...nn.quant_activation import QuantActivation
from ..rules.affine import LAYERS, NORMS
from .faithfulness import first_difference
from .functionalize import functionalize
from .nodes import attribute, is_shape_query, layer_name, node_name, rule_for
from .trace import PixelsToLogits, traced

# Layers that compute something else in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
# Images on which the model and its graph are compared.
_COMPARED = 2
# The most operations without a rule that an error names.
_NAMED = 8


class ModelGraph:
    """A graph, and the copy of the model whose parameters it names.

    Attributes:
        root: the copy; names in the graph are names in it.
        nodes: those on which the output depends, in the order in which they run.
        last_use: for each node, the nodes whose values are not read after it.
        normed: the nodes of linear and convolutional layers that only a BatchNorm reads.
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
        """Return a hash of all operations and of all tensors that they may use."""
        found = hashlib.blake2b(digest_size=16)
        for node in self.nodes:
            found.update(f"{node.format_node()}\n".encode())
            if node.op == "call_module":
                found.update(f"{_settings(self.module(node))}\n".encode())
        tensors = {**self.root.state_dict(), **{
            str(node.target): attribute(self.root, str(node.target)) for node in self.nodes
            if node.op == "get_attr"}}
        for name, value in sorted(tensors.items()):
            found.update(name.encode())
            if isinstance(value, Tensor):
                found.update(f"{value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def module(self, node: fx.Node) -> nn.Module:
        """Return the layer that a call_module node calls."""
        return self.root.get_submodule(str(node.target))

    def quantizer(self, node: fx.Node) -> str | None:
        """Return the name of the quantizer that a node calls; None for other nodes."""
        if node.op != "call_module" or not isinstance(self.module(node), QuantActivation):
            return None
        return layer_name(node)


def _settings(module: nn.Module) -> list[Any]:
    """Return a layer's settings, without its tensors; its repr does not have all of them."""
    found: list[Any] = [type(module).__qualname__, sorted(
        (name, value) for name, value in vars(module).items()
        if name != "training" and _is_plain(value))]
    if isinstance(module, QuantActivation):
        found += [module.spec, module._state.action, module._state.bits,
                  _settings(module.function)]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def model_graph(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> ModelGraph:
    """Trace a model into one graph from pixels to logits.

    Args:
        model: its mode is restored; only its own forward may change anything else of it.
        threat: mean and std.
        key: the keyword under which the model takes images; None: its first argument.
        pixels: (N, ...), for their shape.

    Raises:
        ConversionError: a forward that torch.fx cannot trace, layers without a rule (all of them in
            one message), parameters that are not float32, or a forward that differs from its graph
            or reads values of tensors.
    """
    kind = type(model).__name__
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ConversionError(f"{name} is {value.dtype}",
                                  why="A certificate is for the model that runs in float32.",
                                  fix="Certify and run model.float().")
    root, graph = traced(model, threat, key, pixels)
    forward = PixelsToLogits(model, threat, key, pixels)  # not of a copy: copies may differ
    few = pixels[:_COMPARED]
    more, name_of = torch.cat([few, few[:1]]).flip(-1), functools.partial(node_name, root)
    try:
        with evaluating(forward), checkpoints_inlined():  # as in the trace
            different = first_difference(forward, root, graph, few, name_of)
            with torch.no_grad(), seeded(0):
                different = different or carried(model, lambda: forward(few.clone()))
            # a later call with other images, another number of them, and gradients enabled
            different = different or first_difference(forward, root, graph, more, name_of,
                                                      grad=True)
    except Exception as error:  # whatever the forward raises
        message = str(error).strip().splitlines() or [type(error).__name__]
        different = f"The forward raises: {message[0]}"
    functionalize(root, graph)
    result = ModelGraph(root, graph)
    _check(result)
    if different is not None:
        raise ConversionError(f"the forward of {kind} does not compute what its graph says",
                              why=different,
                              fix="A certificate needs a forward that does not branch on values, "
                                  "does not test whether its input is a tensor, and computes the "
                                  "same in every call.")
    return result


def _check(graph: ModelGraph) -> None:
    """Check that all layers have a rule, and that nothing changes what they compute.

    Raises:
        ConversionError: some do not; the message names all of them.
    """
    problems: dict[str, None] = {}
    depends = {node: node.op == "placeholder" for node in graph.nodes}  # on the images
    for node in graph.nodes:
        depends[node] = depends[node] or any(depends[x] for x in node.all_input_nodes)
        if node.op not in ("call_module", "call_function", "call_method") or not depends[node]:
            continue
        if is_shape_query(node) or \
                all(is_shape_query(x) for x in node.all_input_nodes if depends[x]):
            continue
        if rule_for(graph.root, node) is None:
            problems[node_name(graph.root, node)] = None
        elif node.op == "call_module":
            for problem in _changes_to(graph.module(node)):
                problems[f"{node_name(graph.root, node)}, {problem}"] = None
    if problems:
        several = f"{len(problems)} operations have" if len(problems) > 1 else "one operation has"
        names = ", ".join(list(problems)[:_NAMED])
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ConversionError(f"no certificate: {several} no rule: {names}{more}",
                              why="A bound through an unknown operation would be a guess.",
                              fix="See quantguard.certify for the operations that have one.")


def _changes_to(module: nn.Module) -> Iterator[str]:
    """Yield reasons why a layer does not compute what its rule bounds."""
    every = torch.nn.modules.module  # holds the hooks of all modules
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) \
            or every._global_forward_hooks or every._global_forward_pre_hooks:
        yield "which has hooks or its own forward"
    if module.training and isinstance(module, _MODAL):
        yield "which stays in training mode"
    if isinstance(module, QuantActivation):
        t = module.thresholds
        if not bool((t[..., 1:] > t[..., :-1]).all()):
            yield "whose thresholds do not ascend"
