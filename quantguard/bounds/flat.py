"""The whole model as one flat graph of operations that have rules.

Conversion leaves the user's model as it is; what is certified is a graph of a copy in eval mode,
traced by torch.fx through everything but torch's own layers and staircases.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

from ..activation import QuantActivation
from ..batches import to_pixels
from ..errors import ConversionError
from ..kinds import overwrites
from ..running import duplicate, stand_in
from ..spec import Threat
from ..tracing import place_of
from .arithmetic import normed
from .rules import FUNCTIONS, LAYERS, METHODS, MODULES, NORMS, WRAPPED
from .watched import compared

# What asks for shapes is carried out as it is: only where all it is given is known.
_ASKS = {"size", "dim", "ndimension", "numel"}
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
# What computes otherwise in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
_PREFIX = "model."
# Images that the model and its graph are run on, side by side.
_WATCHED = 2
# Operations without a rule that one error names.
_NAMED = 8


class _Whole(nn.Module):
    """Compute logits from pixels; calls the model, so that its own hooks run."""

    def __init__(self, model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> None:
        super().__init__()
        self.model, self.key = model, key
        self.mean = self.std = None
        if threat.mean is not None:
            self.mean = to_pixels(torch.zeros_like(pixels[:1]), replace(threat, std=None))
        if threat.std is not None:
            self.std = to_pixels(torch.ones_like(pixels[:1]), replace(threat, mean=None))

    def forward(self, x: Any) -> Any:
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        output = self.model(x) if self.key is None else self.model(**{self.key: x})
        if isinstance(output, (fx.Proxy, Tensor)):
            return output
        if isinstance(output, dict) or hasattr(output, "logits"):
            return output["logits"] if isinstance(output, dict) else output.logits
        return output[0]


class _InPlace(fx.Proxy):
    """A value that notes ``x += y``: torch.fx would take it for ``x + y``, and lose the write."""

    def __iadd__(self, other: Any) -> Any:
        return _written("iadd", self, other)

    def __isub__(self, other: Any) -> Any:
        return _written("isub", self, other)

    def __imul__(self, other: Any) -> Any:
        return _written("imul", self, other)

    def __itruediv__(self, other: Any) -> Any:
        return _written("itruediv", self, other)


def _written(name: str, x: fx.Proxy, other: Any) -> Any:
    import operator
    return x.tracer.create_proxy("call_function", getattr(operator, name), (x, other), {})


class _Tracer(fx.Tracer):
    """Trace through everything but layers and staircases; remember what was refused.

    Attributes:
        refusal: the first one; a forward may have caught it and gone on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: Exception | None = None

    def _asked(self, ask: Callable[[fx.Proxy], Any], value: fx.Proxy) -> Any:
        try:
            return ask(value)
        except Exception as error:
            self.refusal = self.refusal or error
            raise

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._asked(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return self._asked(super().iter, obj)  # type: ignore[no-any-return]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A rewritten layer of torch's, a PReLU for one, has a forward of its own.
        rewritten = hasattr(type(m), "_user_class") and "forward" in vars(type(m))
        return isinstance(m, QuantActivation) or (
            not rewritten and super().is_leaf_module(m, module_qualified_name))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlace(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # In a forward that torch.fx could not trace at conversion calls are told apart as it runs.
        other = m.instead() if isinstance(m, QuantActivation) and m.instead is not None else None
        return super().call_module(m, forward, args, kwargs) if other is None else \
            other(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise fx.proxy.TraceError("autocast, which computes in less than float32")
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = place_of(sys._getframe(1))[0]
        return node


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


def flattened(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> Flat:
    """Trace a model into one graph from pixels to logits.

    Args:
        model: in eval mode; it is not touched.
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
    try:
        root = _Whole(duplicate(model), threat, key, pixels).eval()
        before, tracer = _dice(), _Tracer()
        graph = tracer.trace(root)
        rolled = before != _dice()
        if tracer.refusal is not None:
            raise tracer.refusal
    except Exception as error:  # whatever torch.fx or the forward raises on symbolic values
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"the forward of {kind} cannot be traced into one graph", why=f"It says: {said[0]}",
            fix="A certificate needs a forward without branches on values.") from error
    if rolled:
        raise ConversionError(f"the forward of {kind} draws random numbers",
                              why="A certificate is for a model that gives one answer.")
    whole = _Whole(stand_in(model), threat, key, pixels).eval()
    try:
        different = compared(whole, root, graph, pixels[:_WATCHED],
                             lambda node: node_name(root, node))
    except Exception as error:  # whatever the forward raises
        said = str(error).strip().splitlines() or [type(error).__name__]
        different = f"It says: {said[0]}"
    _settle_names(root, graph)
    _drop_unread_values(root, graph)
    _settle_writes(root, graph)
    flat = Flat(root, graph)
    _check(flat)
    if different is not None:
        raise ConversionError(f"the forward of {kind} does not compute what its graph says",
                              why=different,
                              fix="A certificate needs a forward that neither branches on values "
                                  "nor asks whether it is given tensors.")
    return flat


def _dice() -> tuple[Any, ...]:
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(),
            str(numpy.random.get_state()))


def _settle_names(root: nn.Module, graph: fx.Graph) -> None:
    """Give what rules know by its position there, where a call gave it by name."""
    for node in graph.nodes:
        if not node.kwargs or _rule(root, node) is None:
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
        name in _VIEWS or _rule(root, node) is None)


def rule_of(flat: Flat, node: fx.Node) -> Callable[..., Any] | None:
    """Return the rule of a node; None where there is none."""
    layer = node.args[0] if node.args else None
    if isinstance(layer, fx.Node) and layer in flat.normed:
        return functools.partial(normed, flat.module(layer), flat.module(node))
    return _rule(flat.root, node)


def _rule(root: nn.Module, node: fx.Node) -> Callable[..., Any] | None:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        rule = MODULES.get(type(module))
        return None if rule is None else lambda *args, **settings: rule(module, *args, **settings)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    target = node.target
    full_name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    return FUNCTIONS.get(target) or WRAPPED.get(full_name)


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


def asked(node: fx.Node) -> bool:
    """Return whether a node is a number or shape that the graph asked for, not a tensor."""
    if node.op == "call_method" and node.target in _ASKS:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return bool(node.all_input_nodes) and node.op == "call_function" \
        and all(map(asked, node.all_input_nodes))
