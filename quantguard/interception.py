"""Forwards that torch.fx cannot hold: their activation calls are redirected while they run.

Data-dependent control flow, random numbers, ``no_grad`` blocks, attributes set on the way: such a
forward stays as it is written and runs under a torch-function mode, which hands each activation
call in it to a staircase of its own. A call is known by its place in the source and by how often
that place was passed before in the same forward.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .activation import QuantActivation
from .calls import Identity
from .kinds import ALWAYS_KEPT, kind_of
from .shadow import operation
from .tracing import place_of

_ASIDE = "_quantguard_aside"  # what a running forward must not meet among its children
CALL = nn.Module._call_impl.__code__


class Hook(NamedTuple):
    """Say which staircase stands for an intercepted call; "" where it is kept."""

    identity: Identity
    attribute: str
    form: str = "function"
    argument: int | None = None


class Inside(TorchFunctionMode):
    """Know where in owner's running forward a call stands."""

    def __init__(self, owner: nn.Module, frame: types.FrameType) -> None:
        super().__init__()
        self.owner, self.frame = owner, frame
        self._counts: dict[tuple[str, str], int] = {}

    def stands(self, key: str, depth: int = 2, within: nn.Module | None = None,
               ) -> tuple[Identity, str] | None:
        """Return the identity of a call, and its file and line; None in another module's forward.

        Args:
            key: what is called.
            depth: of the calling frame.
            within: the module of ``owner`` that is being called, where it is that.
        """
        start = frame = sys._getframe(depth)
        called = within is not None
        while frame is not self.frame:
            if frame.f_code is CALL:
                if within is None or frame.f_locals.get("self") is not within:
                    return None
                within, start = None, frame
            if frame.f_back is None:
                return None  # recomputed in backward
            frame = frame.f_back
        where, place = place_of(start, self.frame)
        if called:  # a module's call is the same whichever way the forward came there
            place = place.split("<")[0]
        number = self._counts[key, place] = self._counts.get((key, place), 0) + 1
        return (key, place, number), where


class Interception(Inside):
    """Hand the activation calls of one running forward to their staircases."""

    def __init__(self, owner: nn.Module, frame: types.FrameType, hooks: Iterable[Hook],
                 warned: set[Any]) -> None:
        super().__init__(owner, frame)
        self.hooks = {hook.identity: hook for hook in hooks}
        self.names = {key for key, *_ in self.hooks}
        self.staircases: dict[str, Any] = {
            hook.attribute: _find(owner, hook.attribute) for hook in hooks if hook.attribute}
        self.warned = warned

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key, kind = operation(func), kind_of(func)
        if key in self.names or (kind is not None and kind not in ALWAYS_KEPT):
            stands = self.stands(key)
            hook = self._hook(stands[0]) if stands is not None else None
            if hook is not None and hook.attribute:
                staircase = self.staircases[hook.attribute]
                if hook.form == "function":
                    return staircase(args[0] if args else next(iter(kwargs.values())))
                result = func(*args, **kwargs)
                return staircase(result) if hook.argument is None else \
                    staircase(args[hook.argument], result)
            if hook is None and stands is not None and kind is not None:
                self._warn(kind, stands[1])
        return func(*args, **kwargs)

    def _hook(self, identity: Identity) -> Hook | None:
        """Return the hook of a call; passed more often than seen, a place keeps its last one."""
        key, place, number = identity
        while number > 1 and (key, place, number) not in self.hooks:
            number -= 1
        return self.hooks.get((key, place, number))

    def _warn(self, kind: str, where: str) -> None:
        if where not in self.warned:
            self.warned.add(where)
            warnings.warn(f"the {kind} at {where} runs in float: no input reached it when the "
                          "model was converted; convert with example= or data= that does",
                          stacklevel=2)

    @contextmanager
    def redirecting(self) -> Iterator[None]:
        """Send the calls of activation modules to the staircase of the call, too."""
        called = {name for (name, _, _), hook in self.hooks.items() if hook.form == "module"}
        children = {name: self.owner.get_submodule(name) for name in called}
        before = {name: child.instead for name, child in children.items()
                  if isinstance(child, QuantActivation)}

        def choose(name: str) -> Callable[[], QuantActivation | None]:
            def instead() -> QuantActivation | None:
                child = children[name]
                stands = self.stands(name, 3, child)
                hook = self._hook(stands[0]) if stands is not None else None
                if hook is None or hook.attribute in ("", name):
                    return None
                return self.staircases[hook.attribute]  # type: ignore[no-any-return]
            return instead

        try:
            for name in before:
                children[name].instead = choose(name)  # type: ignore[assignment]
            yield
        finally:
            for name, value in before.items():
                children[name].instead = value  # type: ignore[assignment]


def added(hooks: Iterable[Hook]) -> set[str]:
    """Return the names of the staircases that were added, beside those that took a child's."""
    return {h.attribute for h in hooks
            if h.attribute and (h.form != "module" or h.attribute != h.identity[0])}


@contextmanager
def _out_of_sight(owner: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let a forward that goes through its children meet none that it does not know."""
    modules = {name: owner._modules.pop(name) for name in names if name in owner._modules}
    if not modules:  # it has called itself
        yield
        return
    owner.__dict__[_ASIDE] = modules
    try:
        yield
    finally:
        del owner.__dict__[_ASIDE]
        owner._modules.update(modules)


def _find(owner: nn.Module, name: str) -> nn.Module:
    aside: dict[str, nn.Module] = owner.__dict__.get(_ASIDE, {})
    return aside[name] if name in aside else owner.get_submodule(name)


def intercepting(cls: type[nn.Module], hooks: tuple[Hook, ...]) -> Callable[..., Any]:
    """Return the forward of cls under interception."""
    warned: set[Any] = set()
    extra = added(hooks)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = Interception(self, sys._getframe(0), hooks, warned)
        with _out_of_sight(self, extra):
            if all(staircase.bypassed for staircase in mode.staircases.values()):
                return cls.forward(self, *args, **kwargs)  # with whatever fused path it has
            with mode.redirecting(), mode:
                return cls.forward(self, *args, **kwargs)
    # Its frames and the mode are nothing for torch.compile, which would pass the staircases by.
    hidden: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return hidden
