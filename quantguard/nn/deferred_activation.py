"""Results of monotone activations that are not computed until they are read.

Used by ``pool_reordering``. A :class:`DeferredResult` is a Tensor subclass that stands for the
result. Whoever reads it, through a torch function, below autograd or in a backward, gets the
computed result and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class ActivationCall:
    """One call of a monotone activation: its input z, and how to compute its result."""

    def __init__(self, z: Tensor, compute: Callable[[Tensor], Tensor],
                 on_read: Callable[[], None]) -> None:
        self.z, self.compute, self._on_read = z, compute, on_read
        self._before, self._differentiated = z._version, torch.is_grad_enabled()
        self.value: Tensor | None = None
        self._version = 0
        self.read_elsewhere = False  # by anything but a pool

    def store(self, y: Tensor) -> Tensor:
        """Store the computed result, with its version, by which later writes are noticed."""
        self.value, self._version = y, y._version
        return y

    def unchanged(self) -> bool:
        """Return whether neither z nor the result has been written to."""
        return self.z._version == self._before and (
            self.value is None or self.value._version == self._version)

    def produced(self, y: Any) -> bool:
        """Return whether y is the unchanged result or its stand-in, in the same gradient mode."""
        mine = y.call is self if type(y) is DeferredResult else y is not None and y is self.value
        return mine and self._differentiated == torch.is_grad_enabled() and self.unchanged()

    def result(self) -> Tensor:
        """Return the result, for a reader that is not a pool."""
        self._on_read()
        if self.value is None:
            self._check()
            with torch.set_grad_enabled(self._differentiated):
                self.store(self.compute(self.z))
        assert self.value is not None
        return self.value

    def detached_result(self) -> Tensor:
        """Return the result without its graph, for a reader below autograd."""
        self._on_read()
        if self.value is not None:
            return self.value.detach()
        self._check()
        with torch.no_grad():
            return self.compute(self.z)

    def _check(self) -> None:
        if self.z._version != self._before:
            raise RuntimeError("the input of an activation was written to before its result was "
                               "read, in this forward and not in the one before")

    def gradients(self, gradient: Tensor,
                  parameters: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of z and of parameters, with a graph if gradients are enabled."""
        self._check()
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            z = self.z.view_as(self.z) if again else self.z.detach().requires_grad_()
            wanted = [v for v in (z, *parameters) if v.requires_grad]
            found = iter(torch.autograd.grad(self.compute(z), wanted, gradient, allow_unused=True,
                                             create_graph=again))
            return tuple(next(found) if v.requires_grad else None for v in (z, *parameters))


class DeferredResult(Tensor):
    """Stand-in for the result of an activation, which is computed when it is read."""

    call: ActivationCall

    @staticmethod
    def __new__(cls, call: ActivationCall) -> DeferredResult:
        z = call.z
        later: Any = Tensor._make_wrapper_subclass(
            cls, z.shape, strides=z.stride(), dtype=z.dtype, device=z.device)
        later.call = call
        return later  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(materialised, args), **tree_map(materialised, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Iterable[type],  # type: ignore[override]
                           args: Any = (), kwargs: Any = None) -> Any:
        # A reader that torch functions do not see gets its gradient through DeferredFunction.
        if func._schema.is_mutable and args and type(args[0]) is cls:
            raise RuntimeError(f"{func} writes to the result of an activation, in this forward and "
                               "not in the one before")
        return func(*tree_map(detached, args), **tree_map(detached, kwargs or {}))


def materialised(value: Any) -> Any:
    return value.call.result() if type(value) is DeferredResult else value


def detached(value: Any) -> Any:
    return value.call.detached_result() if type(value) is DeferredResult else value


class DeferredFunction(torch.autograd.Function):
    """Return a stand-in; backward computes the activation and passes its gradient on."""

    @staticmethod
    def forward(ctx: Any, call: ActivationCall, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.parameters = call, parameters
        return DeferredResult(call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.gradients(grads[0], ctx.parameters)
