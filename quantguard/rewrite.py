"""Give a module a forward that calls staircases; undo it.

The user's model stays the container. A module whose own forward calls an activation function, or
one activation module several times, gets a subclass of its own class whose ``forward`` is the one
that torch.fx generated, or runs under interception; nothing else about it changes.
"""

from __future__ import annotations

import copy
import itertools
import linecache
from collections import OrderedDict
from typing import Any

from torch import fx, nn

from .activation import staircases
from .calls import Identity, calls_in
from .entrance import NAME, InputStaircase, through_entrance
from .errors import ConversionError
from .interception import Hook, added, intercepting
from .running import device_of
from .spec import InputSpec
from .tracing import (
    Traced,
    Variant,
    inputs_of,
    optional_arguments,
    planned_graphs,
    trace,
    variant_of,
)

_numbers = itertools.count()

Names = tuple[tuple[Identity, str], ...]
"""(call in the user's forward, attribute that is called instead)."""


class Rewritten:
    """Mix into the subclass of a rewritten module: how it is copied, pickled and undone."""

    _user_class: type[nn.Module]
    _names: Names
    _hooks: tuple[Hook, ...]
    _entrance: bool
    _bare = False  # whether its forward is still to be traced

    # No __deepcopy__: a wrapper that hands on every attribute that it lacks would be asked for its
    # own, and answer with this one.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (_Made(type(self)),), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not self._bare:  # a copy
            self.__dict__.update(state)
            return
        super().__setstate__(state)  # type: ignore[misc]
        rewrite(self, self._user_class, self._names,  # type: ignore[arg-type]
                self._hooks, self._entrance)


class _Made:
    """Carry the class of a rewritten module: into a copy as it is, into a file by its names.

    The file names the user's class; its forward is traced again on loading: no code in it.
    """

    def __init__(self, cls: type[Rewritten]) -> None:
        self.cls = cls

    def __deepcopy__(self, memo: dict[int, Any]) -> _Made:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        cls = self.cls
        return _bare, (cls._user_class, cls._names, cls._hooks, cls._entrance)


def _bare(cls: type[nn.Module], names: Names, hooks: tuple[Hook, ...], entrance: bool) -> _Made:
    body = {"_user_class": cls, "_names": names, "_hooks": hooks, "_entrance": entrance,
            "_bare": True}
    return _Made(type(cls.__name__, (Rewritten, cls), body))


def _revive(made: _Made) -> nn.Module:
    module: nn.Module = object.__new__(made.cls)  # type: ignore[assignment]
    return module


def _copy(self: Rewritten, memo: dict[int, Any]) -> Any:
    """Copy a module whose own class says how, which would lose the forward."""
    twin = memo[id(self)] = object.__new__(type(self))
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


def rewrite(module: nn.Module, cls: type[nn.Module], names: Names,
            hooks: tuple[Hook, ...] = (), entrance: bool = False) -> None:
    """Give module a subclass of cls that calls staircases.

    Args:
        names: calls in a forward that torch.fx traces, and what is called instead.
        hooks: calls in one that it cannot trace. Neither: only the fused paths are closed.
        entrance: whether its input goes through its child ``input_staircase`` first.

    Raises:
        ConversionError: a call that is no longer in the forward of cls.
    """
    body: dict[str, Any] = {
        "_user_class": cls, "_names": names, "_hooks": hooks, "_entrance": entrance,
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if names:
        body["forward"] = _generated(module, cls, names)
    elif hooks:
        body["forward"] = intercepting(cls, hooks)
    if entrance:
        body["forward"] = through_entrance(body.get("forward", cls.forward))
    extra = {attribute for _, attribute in names} | added(hooks) | ({NAME} if entrance else set())
    if extra and issubclass(cls, (nn.Sequential, nn.ModuleList)):
        body |= _as_before(cls, extra)
    for name in fused_paths(module):
        body[name] = _closed(name)
    if hasattr(cls, "__deepcopy__"):
        body["__deepcopy__"] = _copy
    module.__class__ = type(cls.__name__, (Rewritten, cls), body)


def add_entrance(model: nn.Module, spec: InputSpec) -> None:
    """Put a staircase on the input of a model that has none, in place."""
    child = InputStaircase(spec).to(device_of(model))
    child.train(model.training)
    model._modules[NAME] = child
    if isinstance(model, Rewritten):
        rewrite(model, model._user_class, model._names, model._hooks, True)
    else:
        rewrite(model, type(model), (), (), True)


def _as_before(cls: type[nn.Module], extra: set[str]) -> dict[str, Any]:
    """Return the methods of a list of modules for one that does not show what was added."""
    def shown(self: nn.Module) -> list[tuple[str, Any]]:
        return [item for item in self._modules.items() if item[0] not in extra]

    def pick(self: nn.Module, index: Any) -> Any:
        found = shown(self)[index]
        if not isinstance(index, slice):
            return found[1]
        return cls(OrderedDict(found)) if issubclass(cls, nn.Sequential) else cls(
            [child for _, child in found])

    return {"__iter__": lambda self: iter([child for _, child in shown(self)]),
            "__len__": lambda self: len(shown(self)), "__getitem__": pick}


_FUSED: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def fused_paths(module: nn.Module) -> list[str]:
    """Return the attributes that let torch compute module by a path around its activations."""
    return [name for cls, name in _FUSED.items() if isinstance(module, cls)]


def _closed(name: str) -> property:
    """Return the attribute: what it was set to under ``bypass``, else nothing."""
    def read(self: nn.Module) -> Any:
        active = any(not q.bypassed for q in staircases(self).values())
        return 0 if active else self.__dict__[name]

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value
    return property(read, write)


def _generated(module: nn.Module, cls: type[nn.Module], names: Names) -> Any:
    """Return the forward that torch.fx generates, with the named attributes called instead."""
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
    """Return a forward that takes, or traces, the graph for the arguments it is called with."""
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        variant = variant_of(cls, self.training, args, kwargs)
        if variant not in forwards:
            try:
                one = trace(self, cls, variant, [attribute for _, attribute in names])
            except Exception as error:
                raise ConversionError(
                    f"the forward of {cls.__qualname__} cannot be traced for these arguments",
                    why=f"{dict(variant.static)}: {error}",
                    fix="Name the module with keep= when converting.") from error
            _redirect(self, one, dict(names))
            forwards[variant] = _compile(one, cls)
        positional, named = inputs_of(cls, variant, args, kwargs)
        return forwards[variant](self, *positional, **named)
    return forward


def _compile(traced: Traced, cls: type[nn.Module]) -> Any:
    code = traced.graph.python_code("self")
    file = f"<quantguard {cls.__qualname__} {next(_numbers)}>"
    # Known to linecache, the generated lines show in a traceback and to torch.compile.
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    space = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    return space["forward"]


def _redirect(module: nn.Module, traced: Traced, names: dict[Identity, str]) -> None:
    """Make a graph call the named attributes, and give module the tensors that it made up."""
    graph = traced.graph
    module.__dict__.update(traced.constants)
    moved: dict[fx.Node, fx.Node] = {}  # a call -> what has taken its place
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


def undo(model: nn.Module) -> set[str]:
    """Give every module of model the user's class back; return what was added for calls."""
    found = set()
    for path, module in list(model.named_modules()):
        if isinstance(module, Rewritten):
            names = {a for _, a in module._names} | added(module._hooks)
            if module._entrance:
                delattr(module, NAME)
            found |= {f"{path}.{name}" if path else name for name in names}
            object.__setattr__(module, "__class__", module._user_class)
    return found
