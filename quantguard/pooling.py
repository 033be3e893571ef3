"""Max-pooling before the activation instead of after it: the same function, with less work.

Behind a staircase most of a pool's window is tied, and the gradient goes to one of the tied values,
whichever comes first: it says little about where the image should move. A staircase is monotone,
so ``pool(q(z)) = q(pool(z))``, and there the largest z gets the gradient. A ReLU has no such ties
(what is tied has no gradient), and there only the work is less: a quarter, behind a pool of 2x2.

``q(z)`` is not computed where a pool alone reads it. Nobody knows that beforehand: in the first
forward it is computed, and where a pool took it and nobody else touched it the next forward gets a
stand-in, which computes ``q(z)`` as soon as anybody else reads it; from then on it is computed
again. All that such a reader can tell is the type: a stand-in is a subclass of Tensor.
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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .activation import QuantActivation
from .contexts import switched
from .layout import is_compiled
from .staircase import spelled_out

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
        self._before, self._differentiated = z._version, torch.is_grad_enabled()
        self.value: Tensor | None = None
        self._version = 0
        self.touched = False  # by anybody but a pool

    def note(self, y: Tensor) -> Tensor:
        """Remember the result; written to later, neither it nor z is what it was."""
        self.value, self._version = y, y._version
        return y

    def unchanged(self) -> bool:
        """Return whether nobody has written to z, or to the result."""
        return self.z._version == self._before and (
            self.value is None or self.value._version == self._version)

    def made(self, y: Any) -> bool:
        """Return whether y is the result, as it was, or its stand-in, to be read as it was made."""
        mine = y.call is self if type(y) is _Later else y is not None and y is self.value
        return mine and self._differentiated == torch.is_grad_enabled() and self.unchanged()

    def result(self) -> Tensor:
        """Return what the activation makes of z, for a reader that is no pool."""
        self._read()
        if self.value is None:
            self._check()
            with torch.set_grad_enabled(self._differentiated):
                self.note(self.compute(self.z))
        assert self.value is not None
        return self.value

    def numbers(self) -> Tensor:
        """Return the result without its graph, for what reads it below autograd."""
        self._read()
        if self.value is not None:
            return self.value.detach()
        self._check()
        with torch.no_grad():
            return self.compute(self.z)

    def _check(self) -> None:
        if self.z._version != self._before:
            raise RuntimeError("what an activation was given has been written to before its result "
                               "was read, in this forward and not in the one before")

    def gradients(self, gradient: Tensor,
                  parameters: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients in z and in parameters, with a graph where one is wanted."""
        self._check()
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            z = self.z.view_as(self.z) if again else self.z.detach().requires_grad_()
            wanted = [v for v in (z, *parameters) if v.requires_grad]
            found = iter(torch.autograd.grad(self.compute(z), wanted, gradient, allow_unused=True,
                                             create_graph=again))
            return tuple(next(found) if v.requires_grad else None for v in (z, *parameters))


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
        if func._schema.is_mutable and args and type(args[0]) is cls:
            raise RuntimeError(f"{func} writes to the result of an activation, in this forward and "
                               "not in the one before")
        return func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs or {}))


def _read(value: Any) -> Any:
    return value.call.result() if type(value) is _Later else value


def _numbers(value: Any) -> Any:
    return value.call.numbers() if type(value) is _Later else value


class _Deferred(torch.autograd.Function):
    """Put out a stand-in; backward: compute what it stands for, and hand its gradient on."""

    @staticmethod
    def forward(ctx: Any, call: _Call, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        return _Later(call)

    @staticmethod
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
        self._taken: dict[int, _Call] = {}  # by pools, of those that nothing is known of
        self._given: list[weakref.ref[_Later]] = []

    def begin(self) -> None:
        """End a forward, and begin the next one."""
        taken, given, count = self._taken, self._given, self._number
        self.forget()
        for number, call in taken.items():
            self._known.setdefault(number, not call.touched and call.unchanged())
        for number in range(count):
            self._known.setdefault(number, False)
        for reference in given:  # who has kept it reads it when thresholds have moved
            _read(reference())

    def forget(self) -> None:
        """Hold on to nothing of a forward."""
        self._taken, self._given, self._number = {}, [], 0
        self._latest.clear()

    def quantized(self, staircase: QuantActivation, z: Tensor) -> Tensor:
        """Return what a staircase makes of z, or a stand-in for it."""
        z, state = _read(z), staircase._state
        if not _usual(z):
            return staircase.quantized(z)
        return self._activated(z, lambda v: staircase.quantized(v, state), *staircase.parameters())

    def _activated(self, z: Tensor, compute: Callable[[Tensor], Tensor],
                   *parameters: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        known = self._known.get(number) if self._puts_off and not spelled_out() else False
        if compute is _relu and known is False:
            return compute(z)  # there are no ties that a pool would have to come before
        call = _Call(z, compute, lambda: self._known.__setitem__(number, False))
        self._latest.append((number, call))
        if not known:
            return call.note(compute(z))
        later: Tensor = _Deferred.apply(call, z, *parameters)
        self._given.append(weakref.ref(later))  # type: ignore[arg-type]
        return later

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._puts_off and torch.compiler.is_compiling():
            return func(*args, **kwargs)  # of a function that the model's forward calls
        if self._puts_off and func in _RELUS and len(args) == 1 and not kwargs.get("inplace") \
                and _usual(args[0]):
            return self._activated(args[0], _relu)
        if getattr(func, "__name__", "") in _POOLS and args and _plain(args, kwargs):
            for number, call in self._latest:
                if call.made(args[0]):
                    pooled = self._pooled(number, call, func, args, kwargs)
                    if pooled is not None:
                        return pooled
        if self._puts_off and len(self._known) < self._number:  # of some nothing is known yet
            read = {id(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            for _, call in [*self._latest, *self._taken.items()]:
                call.touched |= id(call.value) in read
        return func(*args, **kwargs)

    def _pooled(self, number: int, call: _Call, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the activation of the pool; None where another tensor is to be pooled."""
        if number not in self._known:
            self._taken[number] = call
        if call.compute is _relu and call.value is not None:
            return func(call.value, *args[1:], **kwargs)
        found = func(call.z, *args[1:], **kwargs)
        return call.compute(found) if isinstance(found, Tensor) else None


def _plain(args: Any, kwargs: Any) -> bool:
    """Return whether a pool puts out maxima alone, each of one element at least."""
    dilation = kwargs.get("dilation", args[4] if len(args) > 4 else 1)
    return not kwargs.get("return_indices") and all(
        d == 1 for d in (dilation if isinstance(dilation, (tuple, list)) else [dilation]))


def _usual(z: Any) -> bool:
    """Return whether z is a plain tensor with a version, which nobody computes with again.

    Checkpointing, say, counts on the same operations outside of this mode.
    """
    if type(z) is not Tensor or torch.is_inference_mode_enabled() or z.is_inference():
        return False
    return torch.compiler.is_compiling() or \
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None


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
        mode.begin()
    finally:
        mode.forget()
        handle.remove()
