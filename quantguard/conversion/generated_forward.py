"""The forward that torch.fx generates for a module, with quantizers called for activations."""

from __future__ import annotations

import itertools
import linecache
from typing import Any

from torch import fx, nn

from ..core.errors import ConversionError
from .activation_calls import Identity, calls_in
from .fx_tracer import Traced, planned_graphs, trace
from .fx_variants import Variant, inputs_of, optional_arguments, variant_of

_numbers = itertools.count()

Names = tuple[tuple[Identity, str], ...]
"""(call in the user's forward, attribute that is called instead)."""


def generated_forward(module: nn.Module, cls: type[nn.Module], names: Names) -> Any:
    """Return the forward that torch.fx generates, calling the named attributes instead.

    Raises:
        ConversionError: a call that is no longer in the forward of cls.
    """
    traced = planned_graphs(module, cls, [attribute for _, attribute in names])
    found = {call.identity for one in traced.values() for call in calls_in(module, one)}
    gone = [identity for identity, _ in names if identity not in found]
    if gone:
        raise ConversionError(
            f"{cls.__qualname__} no longer calls {gone[0][0]} at {gone[0][1]}",
            why="Its source has changed since the model was converted.",
            fix="Convert the float model again, then load the converted one's state_dict.")
    forwards: dict[Variant, Any] = {}
    compiled: dict[int, Any] = {}
    for variant, one in traced.items():
        if id(one) not in compiled:
            _redirect(module, one, dict(names))
            compiled[id(one)] = _compile(one, cls)
        forwards[variant] = compiled[id(one)]
    if optional_arguments(cls):
        return _by_arguments(cls, names, forwards)
    if len(compiled) == 1:
        return next(iter(forwards.values()))
    return _by_mode({variant.training: one for variant, one in forwards.items()})


def _by_mode(modes: dict[bool, Any]) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return modes[self.training](self, *args, **kwargs)
    return forward


def _by_arguments(cls: type[nn.Module], names: Names, forwards: dict[Variant, Any]) -> Any:
    """Return a forward that picks, or traces, the graph for the arguments of the call."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        variant = variant_of(cls, self.training, args, kwargs)
        if variant not in forwards:
            try:
                one = trace(self, cls, variant, [attribute for _, attribute in names])
            except Exception as error:
                raise ConversionError(
                    f"the forward of {cls.__qualname__} cannot be traced for these arguments",
                    why=f"{dict(variant.static)}: {error}",
                    fix="Name the module with exclude= when converting.") from error
            _redirect(self, one, dict(names))
            forwards[variant] = _compile(one, cls)
        positional, named = inputs_of(cls, variant, args, kwargs)
        return forwards[variant](self, *positional, **named)
    return forward


def _compile(traced: Traced, cls: type[nn.Module]) -> Any:
    code = traced.graph.python_code("self")
    file = f"<quantguard {cls.__qualname__} {next(_numbers)}>"
    # With an entry in linecache, tracebacks and torch.compile can read the generated lines.
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    space = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    return space["forward"]


def _redirect(module: nn.Module, traced: Traced, names: dict[Identity, str]) -> None:
    """Make a graph call the named attributes, and store the tensors that it created in module."""
    graph = traced.graph
    module.__dict__.update(traced.constants)
    moved: dict[fx.Node, fx.Node] = {}  # a call -> the call of its quantizer
    for call in calls_in(module, traced):
        attribute = names.get(call.identity)
        if attribute is None:
            continue
        node, source = call.node, call.source
        assert source is not None
        source = moved.get(source, source)
        if call.form == "spelled":
            with graph.inserting_after(node):
                new = graph.call_module(attribute, (node,) if source is node else (source, node))
            for user in [user for user in node.users if user is not new]:
                user.replace_input_with(node, new)
            moved[node] = new
        elif call.target:
            node.target, node.args, node.kwargs = attribute, (source,), {}
        else:
            with graph.inserting_before(node):
                new = graph.call_module(attribute, (source,))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moved[node] = new
    graph.lint()
