"""Max-pooling before the activation instead of after it: the same function, with less work.

Behind a staircase most of a pool's window is tied, and the gradient goes to one of the tied values,
whichever comes first: it says little about where the image should move. A staircase is monotone,
so ``pool(q(z)) = q(pool(z))``, and there the largest z gets the gradient. A ReLU has no such ties
(what is tied has no gradient), and there only the work is less: a quarter, behind a pool of 2x2.

``q(z)`` is not computed where a pool alone reads it. Nobody knows that beforehand: the first time
it is computed, and where a pool took it the next forward gets a stand-in, which computes ``q(z)``
as soon as anybody else reads it; from then on it is computed again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .activation import QuantActivation
from .contexts import switched
from .layout import is_compiled

_POOLS = {f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
_RELUS = (F.relu, torch.relu, Tensor.relu)
# Activations whose results a pool may still read: more, and their memory would be held for long.
_LATEST = 4
# Of each model: whether a pool alone read the result of its n-th activation in a forward.
_known: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


class _Call:
    """Hold one call of a monotone activation: what it was given, and what it makes of that."""

    def __init__(self, z: Tensor, compute: Callable[[Tensor], Tensor],
                 read: Callable[[], None]) -> None:
        self.z, self.compute, self._read = z, compute, read
        self.before, self.differentiated = z._version, torch.is_grad_enabled()
        self.value: tuple[Tensor, int] | None = None  # the result, and its version

    def note(self, y: Tensor) -> Tensor:
        """Remember the result; written to later, neither it nor z is what it was."""
        self.value = y, y._version
        return y

    def made(self, y: Tensor) -> bool:
        """Return whether y is the result, as it was, or its stand-in."""
        if self.z._version != self.before:
            return False
        if self.value is not None and self.value[0]._version != self.value[1]:
            return False
        return y.call is self if type(y) is _Later else \
            self.value is not None and y is self.value[0]

    def result(self) -> Tensor:
        """Return what the activation makes of z, for a reader that is no pool."""
        self._read()
        if self.value is None:
            self._check()
            if self.differentiated and not torch.is_grad_enabled():
                return self.compute(self.z)  # there may be readers with a gradient still
            self.note(self.compute(self.z))
        assert self.value is not None
        return self.value[0]

    def _check(self) -> None:
        if self.z._version != self.before:
            raise RuntimeError("what an activation was given has been written to before its result "
                               "was read, in this forward and not in the one before")

    def gradients(self, gradient: Tensor,
                  parameters: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients in z and in parameters."""
        self._check()
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            wanted = [z, *(p for p in parameters if p.requires_grad)]
            found = iter(torch.autograd.grad(self.compute(z), wanted, gradient, allow_unused=True))
            return next(found), *(next(found) if p.requires_grad else None for p in parameters)


class _Later(Tensor):
    """Stand for the result of an activation until somebody reads it."""

    call: _Call

    @staticmethod
    def __new__(cls, call: _Call) -> _Later:
        z = call.z
        later: Any = Tensor._make_wrapper_subclass(
            cls, z.shape, strides=z.stride(), dtype=z.dtype, device=z.device)
        later.call = call
        return later  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_read, args), **tree_map(_read, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Iterable[type],  # type: ignore[override]
                           args: Any = (), kwargs: Any = None) -> Any:
        # what reads it unseen by torch functions takes its gradient through _Deferred
        with torch.no_grad():
            args, kwargs = tree_map(_read, args), tree_map(_read, kwargs or {})
        return func(*args, **kwargs)


def _read(value: Any) -> Any:
    return value.call.result() if type(value) is _Later else value


class _Deferred(torch.autograd.Function):
    """Put out a stand-in; backward: compute what it stands for, and hand its gradient on."""

    @staticmethod
    def forward(ctx: Any, call: _Call, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        return _Later(call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.gradients(grads[0], ctx.parameters)


class _PoolsFirst(TorchFunctionMode):
    """Answer a max-pool of what an activation put out by the activation of the pool.

    Args:
        known: of the n-th activation of a forward, whether a pool alone reads its result; what is
            found out is written there. None: nothing is put off, and ReLUs are left alone.
    """

    def __init__(self, known: dict[int, bool] | None) -> None:
        super().__init__()
        self._puts_off, self._known = known is not None, {} if known is None else known
        self._number = 0
        self._latest: deque[tuple[int, _Call]] = deque(maxlen=_LATEST)

    def begin(self) -> None:
        """Begin a forward: results that no pool took in the one before are not waited for again."""
        for number in range(self._number):
            self._known.setdefault(number, False)
        self._number = 0
        self._latest.clear()

    def quantized(self, staircase: QuantActivation, z: Tensor) -> Tensor:
        """Return what a staircase makes of z, or a stand-in for it."""
        z, state = _read(z), staircase._state
        if type(z) is not Tensor or z.is_inference():
            return staircase.quantized(z)
        return self._activated(z, lambda v: staircase.quantized(v, state), *staircase.parameters())

    def _activated(self, z: Tensor, compute: Callable[[Tensor], Tensor],
                   *parameters: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        if compute is _relu and not self._known.get(number, True):
            return compute(z)  # there are no ties that a pool would have to come before
        call = _Call(z, compute, lambda: self._known.__setitem__(number, False))
        self._latest.append((number, call))
        if self._puts_off and self._known.get(number):
            return _Deferred.apply(call, z, *parameters)  # type: ignore[no-any-return]
        return call.note(compute(z))

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._puts_off and func in _RELUS and len(args) == 1 and type(args[0]) is Tensor \
                and not kwargs.get("inplace") and not args[0].is_inference():
            return self._activated(args[0], _relu)
        if getattr(func, "__name__", "") in _POOLS and not kwargs.get("return_indices") and args:
            for number, call in self._latest:
                if call.made(args[0]):
                    self._known.setdefault(number, True)
                    return call.compute(func(call.z, *args[1:], **kwargs))
        return func(*args, **kwargs)


def _relu(z: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.relu(z)


@contextmanager
def pools_first(model: nn.Module) -> Iterator[nn.Module]:
    """Pool before activating wherever model pools right after, inside the context.

    Staircases, and ReLUs that do not write into what they are given. What model computes does not
    change, but for pools that return indices, which stay where they are.
    """
    mode = _PoolsFirst(None if is_compiled(model) else _known.setdefault(model, {}))
    handle = model.register_forward_pre_hook(lambda *_: mode.begin())
    try:
        with switched(model, {"answers": mode.quantized}), mode:
            yield model
    finally:
        mode.begin()
        handle.remove()
