"""Variants of a forward: the choices of mode and of optional arguments that a graph fixes."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import fx, nn

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*",
                          inspect.Parameter.VAR_KEYWORD: "**"}


class Variant(NamedTuple):
    """One choice that a graph fixes: the mode, and the values of optional arguments.

    Attributes:
        training: the mode.
        static: optional arguments fixed at plain values (None, numbers, text), sorted by name;
            all others are inputs of the graph.
    """

    training: bool
    static: tuple[tuple[str, Any], ...] = ()


class RecordedMode:
    """Replacement of a module's ``training`` that records whether the forward reads it."""

    def __init__(self, training: bool) -> None:
        self.training, self.was_read = training, False

    def __get__(self, module: nn.Module, cls: type[nn.Module]) -> bool:
        self.was_read = True
        return self.training

    def __set__(self, module: nn.Module, value: Any) -> None:
        raise fx.proxy.TraceError("forward sets self.training, which a graph cannot hold")


def optional_arguments(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the optional arguments of forward and their defaults."""
    return {p.name: p.default for p in inspect.signature(cls.forward).parameters.values()
            if p.default is not p.empty}


def is_plain(value: Any) -> bool:
    """Return whether an argument is a plain value, which a graph holds as a constant."""
    return value is None or isinstance(value, (bool, int, float, str)) or (
        isinstance(value, tuple) and all(map(is_plain, value)))


def variant_of(cls: type[nn.Module], training: bool, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Variant:
    """Return the variant that a call of forward needs."""
    bound = inspect.signature(cls.forward).bind(None, *args, **kwargs).arguments
    values = {name: bound.get(name, default) for name, default in optional_arguments(cls).items()}
    return Variant(training, tuple(sorted((k, v) for k, v in values.items() if is_plain(v))))


def inputs_of(cls: type[nn.Module], variant: Variant, args: tuple[Any, ...],
              kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that a variant's graph takes: those that the variant does not fix."""
    signature = inspect.signature(cls.forward)
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    fixed = dict(variant.static)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= value
        elif parameter.name in fixed:
            continue
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            positional.append(value)
    return positional, named


def specialized(cls: type[nn.Module], variant: Variant, mode: RecordedMode) -> type[nn.Module]:
    """Return a subclass of cls in that mode, whose forward lacks the arguments that are fixed.

    This replaces ``concrete_args`` of torch.fx, which renames arguments, asserts on their values
    and takes no tuples.
    """
    fixed = dict(variant.static)
    body = {"training": mode, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if not fixed:
        return type(cls.__name__, (cls,), body)
    taken, passed, star = ["self"], ["self"], False
    for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:
        name = parameter.name
        mark = _STARS.get(parameter.kind, "")
        value = f"_fixed[{name!r}]" if name in fixed else mark + name
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        passed.append(f"{name}={value}" if keyword else value)
        if name not in fixed:
            if keyword and not star:
                taken.append("*")
            taken.append(mark + name)
        star = star or keyword or mark == "*"
    space: dict[str, Any] = {"_fixed": fixed, "_forward": cls.forward}
    exec(f"def forward({', '.join(taken)}): return _forward({', '.join(passed)})", space)
    return type(cls.__name__, (cls,), body | {"forward": space["forward"]})


def planned_variants(cls: type[nn.Module]) -> list[Variant]:
    """Return the variants of a plan: both modes, optional arguments left out or passed."""
    defaults = optional_arguments(cls)
    left_out = tuple(sorted((k, v) for k, v in defaults.items() if is_plain(v)))
    variants = [Variant(False, left_out), Variant(True, left_out)]
    passed = tuple((k, v) for k, v in left_out if v is not None)
    return variants if passed == left_out else [*variants, Variant(False, passed),
                                               Variant(True, passed)]
