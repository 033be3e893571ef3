"""Find the activation calls in a traced forward: modules, functions, methods, arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ..nn.activation_kinds import ALWAYS_EXCLUDED, MODULE_KINDS, kind_of, module_of, overwrites
from ..nn.numeric_match import Shadows, Spelled, number_of
from ..nn.quant_activation import QuantActivation
from .fx_tracer import Traced

Identity = tuple[str, str, int]
"""Identity of a call in every graph of a forward: (what is called, place, number there)."""

RESHAPES = frozenset((
    "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose",
    "flatten", "view_as"))
"""Operations whose result is their input in another shape."""


@dataclass(frozen=True)
class Call:
    """One activation call found in a graph.

    Attributes:
        form: ``module``, ``function`` or ``method``; ``spelled`` if the activation is written out
            in arithmetic, which stays, and the quantizer gets its input and its result.
        target: name of the called module.
        function: the float activation as a module.
        source: the input of the activation.
        overwritten: the tensor that an in-place form overwrites.
    """

    node: fx.Node
    kind: str
    form: str
    target: str
    function: nn.Module
    source: fx.Node | None
    identity: Identity
    overwritten: fx.Node | None


def calls_in(module: nn.Module, traced: Traced) -> list[Call]:
    """Return the activation calls of a graph in order."""
    shadows = Shadows({})
    numbers: dict[int, fx.Node] = {}
    calls: dict[fx.Node, Call] = {}
    counts: dict[tuple[str, str], int] = {}

    def add(node: fx.Node, kind: str, form: str, target: str, function: nn.Module,
            source: Any) -> None:
        key = (target or f"{kind}()", node.meta.get("place", ""))
        counts[key] = counts.get(key, 0) + 1
        target_of_write = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if form == "spelled" and overwrites(node.target, node.args, node.kwargs):
            # The input has been overwritten: the quantizer gets the result alone.
            source, function = node, nn.Identity()
        calls[node] = Call(node, kind, form, target, function,
                           source if isinstance(source, fx.Node) else None, (*key, counts[key]),
                           target_of_write if isinstance(target_of_write, fx.Node) else None)

    for node in traced.graph.nodes:
        source = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        operation: Any = node.target
        kind = None
        if node.op == "get_attr":
            value = _constant(module, traced, str(node.target))
            if value is not None:
                shadows.constant(node, value)
            continue
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            # In a graph that is traced again, a quantizer counts as its float activation.
            operation = child.function if isinstance(child, QuantActivation) else child
            kind = MODULE_KINDS.get(type(operation))
            if kind is None:
                numbers[shadows.number(node)] = node
                continue
        elif node.op not in ("call_function", "call_method"):
            numbers[shadows.number(node)] = node
            continue
        spelled = shadows.note(node, operation, node.args, node.kwargs, _is_node)
        if not shadows.is_constant(node):
            numbers[shadows.number(node)] = node
        if node.op == "call_module":
            assert kind is not None
            add(node, kind, "module", str(node.target), operation, source)
            continue
        kind = kind_of(operation)
        if kind is None:
            if spelled is not None:
                _drop_parts(calls, numbers, node, spelled)
                add(node, spelled.kind, "spelled", "", spelled.function, numbers[spelled.root])
            continue
        function = nn.Identity() if kind in ALWAYS_EXCLUDED else \
            module_of(kind, node.args, node.kwargs, fx.Node)
        form = "method" if node.op == "call_method" else "function"
        add(node, kind, "spelled" if function is None else form, "", function or nn.Identity(),
            source)
    return list(calls.values())


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _constant(module: nn.Module, traced: Traced, name: str) -> float | None:
    """Return the value of an attribute that holds a single number, else None."""
    value: Any = traced.constants.get(name)
    if value is None:
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
    if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.numel() == 1):
        return number_of(value)
    return None


def _drop_parts(calls: dict[fx.Node, Call], numbers: dict[int, fx.Node], node: fx.Node,
                spelled: Spelled) -> None:
    """Remove the calls that are only parts of a spelled-out activation."""
    inside = {numbers[n] for n in spelled.through if n in numbers} | {node}
    changed = True
    while changed:
        changed = False
        for part in [n for n in inside if n in calls]:
            if set(part.users) <= inside:
                del calls[part]
                changed = True


def is_gate(node: fx.Node) -> bool:
    """Return whether the result of the node is a factor of a product."""
    for user in node.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if name in ("mul", "mul_", "imul"):
            return True
        if (name in RESHAPES or name in ("chunk", "getitem", "split")) and is_gate(user):
            return True
    return False


class NamedCall(NamedTuple):
    """A call, the name of its quantizer in the module, and its number among those of its kind."""

    call: Call
    name: str
    number: int


def named_calls(module: nn.Module, graphs: Iterable[Traced]) -> list[NamedCall]:
    """Return the calls of all graphs of a forward, each once.

    A module's first call keeps the module's own name; later calls and functions get a name of
    their own.
    """
    named: dict[Identity, NamedCall] = {}
    counts: dict[str, int] = {}
    for traced in graphs:
        for call in calls_in(module, traced):
            if call.identity in named:
                continue
            key = call.identity[0]
            counts[key] = number = counts.get(key, 0) + 1
            named[call.identity] = NamedCall(
                call, own_name(module, call.target, call.kind, number), number)
    return list(named.values())


def own_name(module: nn.Module, target: str, kind: str, number: int) -> str:
    """Return the name of the quantizer of the number-th call of a child or a kind."""
    if target and number == 1:
        return target
    name = target.replace(".", "_") or kind
    if number > 1:
        name += f"_{number}"
    while hasattr(module, name):
        name += "_q"
    return name
