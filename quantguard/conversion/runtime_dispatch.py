"""Redirect the activation calls of a running forward, for forwards that torch.fx cannot trace.

A forward with data-dependent control flow, random numbers, ``no_grad`` blocks or attribute
assignments is not rewritten. It runs under a torch-function mode, which passes each activation call
to a quantizer of its own. A call is identified by its place in the source and by how often that
place was reached before in the same forward.
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

from ..core.source_location import place_of
from ..nn.activation_kinds import ALWAYS_EXCLUDED, kind_of
from ..nn.numeric_match import operation
from ..nn.quant_activation import QuantActivation
from .activation_calls import Identity

_HIDDEN_CHILDREN = "_quantguard_aside"  # holds added children while a forward runs
CALL = nn.Module._call_impl.__code__


class Hook(NamedTuple):
    """Attribute of the quantizer that replaces an intercepted call; "" if the call stays float."""

    identity: Identity
    attribute: str
    form: str = "function"
    argument: int | None = None


class CallLocator(TorchFunctionMode):
    """Torch-function mode that locates calls in owner's running forward."""

    def __init__(self, owner: nn.Module, frame: types.FrameType) -> None:
        super().__init__()
        self.owner, self.frame = owner, frame
        self._counts: dict[tuple[str, str], int] = {}

    def locate(self, key: str, depth: int = 2, within: nn.Module | None = None,
               ) -> tuple[Identity, str] | None:
        """Return the identity of a call, and its file and line; None in another module's forward.

        Args:
            key: name of the function or child that is called.
            depth: depth of the calling frame.
            within: the child of ``owner`` that is being called, if any.
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
        if called:  # the place of a module's call does not depend on the callers
            place = place.split("<")[0]
        number = self._counts[key, place] = self._counts.get((key, place), 0) + 1
        return (key, place, number), where


class Interception(CallLocator):
    """Torch-function mode that passes the activation calls of a forward to their quantizers."""

    def __init__(self, owner: nn.Module, frame: types.FrameType, hooks: Iterable[Hook],
                 warned: set[Any]) -> None:
        super().__init__(owner, frame)
        self.hooks = {hook.identity: hook for hook in hooks}
        self.names = {key for key, *_ in self.hooks}
        self.quantizers: dict[str, Any] = {
            hook.attribute: _find(owner, hook.attribute) for hook in hooks if hook.attribute}
        self.warned = warned

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key, kind = operation(func), kind_of(func)
        if key in self.names or (kind is not None and kind not in ALWAYS_EXCLUDED):
            located = self.locate(key)
            hook = self._hook(located[0]) if located is not None else None
            if hook is not None and hook.attribute:
                quantizer = self.quantizers[hook.attribute]
                if hook.form == "function":
                    return quantizer(args[0] if args else next(iter(kwargs.values())))
                result = func(*args, **kwargs)
                return quantizer(result) if hook.argument is None else \
                    quantizer(args[hook.argument], result)
            if hook is None and located is not None and kind is not None:
                self._warn(kind, located[1])
        return func(*args, **kwargs)

    def _hook(self, identity: Identity) -> Hook | None:
        """Return the hook of a call; a place reached more often than recorded uses its last one."""
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
        """Also pass calls of activation modules to the quantizer of the call."""
        called = {name for (name, _, _), hook in self.hooks.items() if hook.form == "module"}
        children = {name: self.owner.get_submodule(name) for name in called}
        before = {name: child.instead for name, child in children.items()
                  if isinstance(child, QuantActivation)}

        def choose(name: str) -> Callable[[], QuantActivation | None]:
            def instead() -> QuantActivation | None:
                child = children[name]
                located = self.locate(name, 3, child)
                hook = self._hook(located[0]) if located is not None else None
                if hook is None or hook.attribute in ("", name):
                    return None
                return self.quantizers[hook.attribute]  # type: ignore[no-any-return]
            return instead

        try:
            for name in before:
                children[name].instead = choose(name)  # type: ignore[assignment]
            yield
        finally:
            for name, value in before.items():
                children[name].instead = value  # type: ignore[assignment]


def added(hooks: Iterable[Hook]) -> set[str]:
    """Return the names of added quantizers, without those that replace a child."""
    return {h.attribute for h in hooks
            if h.attribute and (h.form != "module" or h.attribute != h.identity[0])}


@contextmanager
def _hidden(owner: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Hide added children from a forward that iterates over its children."""
    modules = {name: owner._modules.pop(name) for name in names if name in owner._modules}
    if not modules:  # the forward has called itself
        yield
        return
    owner.__dict__[_HIDDEN_CHILDREN] = modules
    try:
        yield
    finally:
        del owner.__dict__[_HIDDEN_CHILDREN]
        owner._modules.update(modules)


def _find(owner: nn.Module, name: str) -> nn.Module:
    hidden: dict[str, nn.Module] = owner.__dict__.get(_HIDDEN_CHILDREN, {})
    return hidden[name] if name in hidden else owner.get_submodule(name)


def intercepting(cls: type[nn.Module], hooks: tuple[Hook, ...]) -> Callable[..., Any]:
    """Return the forward of cls under interception."""
    warned: set[Any] = set()
    extra = added(hooks)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = Interception(self, sys._getframe(0), hooks, warned)
        with _hidden(self, extra):
            if all(quantizer.bypassed for quantizer in mode.quantizers.values()):
                return cls.forward(self, *args, **kwargs)  # including torch's fused paths
            with mode.redirecting(), mode:
                return cls.forward(self, *args, **kwargs)
    # torch.compile cannot handle frames and the mode: it would skip the quantizers.
    hidden: Callable[..., Any] = torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
    return hidden
