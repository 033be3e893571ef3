"""Torch function mode that numbers the calls of a forward, and may replace their tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

# First number of calls outside the counted module's forward.
_BEFORE = -1_000_000
# Attribute accesses are not counted as calls: the modes themselves make some.
_ATTRIBUTES = ("__get__", "__set__")


def custom_function(cls: Any) -> bool:
    """Return whether an autograd Function is neither torch's nor ours."""
    return cls.__module__.split(".")[0] not in ("quantguard", "torch")


@contextmanager
def functions_hidden(calls: NumberedCalls) -> Iterator[None]:
    """Count each custom Function as one call, and hide the calls inside it, in the context.

    torch has no hook for calls of a custom Function: ``Function.apply`` is replaced in the context.
    """
    function: Any = torch.autograd.Function
    before = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        plain = before.__get__(None, cls)
        if not custom_function(cls) or calls.hidden:
            return plain(*args, **kwargs)
        return calls.apply_function(cls, plain, args, kwargs)
    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = before


class Place(NamedTuple):
    """Position of a tensor in a forward: a call, and one of its arguments or results.

    Attributes:
        call: number of the call, from 0.
        name: name of the called function.
        result: whether it is a result; else an argument.
        at: index among all leaves of the arguments or results.
    """

    call: int
    name: str
    result: bool
    at: int


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


class NumberedCalls(TorchFunctionMode):
    """Base class of modes that number calls, and read or replace arguments and results.

    Attributes:
        number: of the next call.
        hidden: whether calls are passed on without a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number, self.hidden = _BEFORE, False

    def restart(self, *_: Any) -> None:
        """Start the numbers of a new forward."""
        self.number = 0

    @contextmanager
    def counting_from(self, model: nn.Module) -> Iterator[None]:
        """Restart whenever model is called, in the context."""
        hook = model.register_forward_pre_hook(self.restart)
        try:
            yield
        finally:
            hook.remove()

    def apply_function(self, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a Function's ``apply``, hiding the calls inside it."""
        def named(*args: Any, **kwargs: Any) -> Any:
            return apply(*args, **kwargs)
        named.__name__ = f"{cls.__name__}.apply"
        self.hidden = True
        try:
            return self.numbered(named, args, kwargs)
        finally:
            self.hidden = False

    @abstractmethod
    def relevant(self, number: int) -> bool:
        """Return whether a call's arguments and results are read or replaced."""

    def replace_arguments(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        """Return the leaves of a call's arguments, or others to replace them."""
        return leaves

    def replace_result(self, number: int, name: str, result: Any) -> Any:
        """Return a call's result, or another to replace it."""
        return result

    def run(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute the call."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.hidden or _name(func) in _ATTRIBUTES:
            return func(*args, **kwargs)
        other = next((t for t in types if not issubclass(t, Tensor)), None)
        if other is not None:
            # A wrapper of tensors: number the calls that it makes instead.
            with self:
                return other.__torch_function__(func, types, args, kwargs)
        return self.numbered(func, args, kwargs)

    def numbered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Give a call the next number, and execute it."""
        number = self.number
        self.number += 1
        if not self.relevant(number):
            return self.run(number, func, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        replaced = self.replace_arguments(number, _name(func), list(leaves))
        if any(a is not b for a, b in zip(leaves, replaced, strict=True)):
            args, kwargs = tree_unflatten(replaced, spec)
        result = self.run(number, func, args, kwargs)
        return self.replace_result(number, _name(func), result)
