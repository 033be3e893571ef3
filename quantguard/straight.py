"""A gradient through foreign steps while attacking: rounding, signs, Functions that give zeros.

What the model computes does not change; only the backward of what has a zero gradient does: the
straight-through estimate (Bengio, Leonard, Courville 2013, arXiv:1308.3432), which an attacker may
take as well as anyone (backward pass differentiable approximation, Athalye, Carlini, Wagner 2018,
arXiv:1802.00420, section 4.1). Comparisons that turn into booleans stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ROUNDINGS = {"round", "floor", "ceil", "trunc", "fix"}
_SIGNS = {"sign", "sgn"}


class _Straight(torch.autograd.Function):
    """Pass y on; backward as of x, or for a sign as of ``tanh(2 x / mean |x|)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sign: bool) -> Tensor:
        ctx.sign = sign
        if sign:
            ctx.save_for_backward(x.clone())  # x may be written to
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.sign:
            return grads[0], None, None
        (x,) = ctx.saved_tensors
        rows = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
        scale = 2 / rows.abs().mean(1).clamp_min(1e-12).reshape(-1, *[1] * (x.dim() - 1))
        return grads[0] * scale * (1 - (x * scale).tanh().square()), None, None


class _In(torch.autograd.Function):
    """Pass x on; backward: where an image's gradient is all zero, what came into the Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, came = grads[0], ctx.seen.pop("grad", None)
        if came is None or came.shape != grad.shape or grad.dim() == 0:
            return grad, None
        rows = grad.flatten(1) if grad.dim() > 1 else grad.reshape(-1, 1)
        dead = (rows == 0).all(1).reshape(-1, *[1] * (grad.dim() - 1))
        return torch.where(dead, came, grad), None


class _Out(torch.autograd.Function):
    """Pass y on; backward: note the gradient that comes in."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, seen: dict[str, Tensor]) -> Tensor:
        ctx.seen = seen
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen["grad"] = grads[0]
        return grads[0], None


class _StraightThrough(TorchFunctionMode):
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_")
        flat = name in _ROUNDINGS or name in _SIGNS
        if not (flat and args and isinstance(args[0], Tensor) and args[0].requires_grad
                and torch.is_grad_enabled()) or "out" in kwargs:
            return func(*args, **kwargs)
        x = args[0]
        with torch.no_grad():
            y = getattr(torch, name)(*args, **kwargs)
        z = _Straight.apply(x, y, name in _SIGNS)
        return x.copy_(z) if func.__name__.endswith("_") else z


def _watched(apply: Any) -> Callable[..., Any]:
    """Return ``Function.apply`` that lets no image's gradient vanish in a foreign Function."""
    def through(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        if cls.__module__.split(".")[0] in ("quantguard", "torch") or not tensors \
                or not torch.is_grad_enabled():
            return apply.__get__(None, cls)(*args, **kwargs)
        seen: dict[str, Tensor] = {}
        at = tensors[0]
        inner = (*args[:at], _In.apply(args[at], seen), *args[at + 1:])
        y = apply.__get__(None, cls)(*inner, **kwargs)
        return _Out.apply(y, seen) if isinstance(y, Tensor) and y.shape == args[at].shape \
            and y.is_floating_point() and y.requires_grad else y
    return through


@contextmanager
def straight_through() -> Iterator[None]:
    """Give foreign steps a gradient, inside the context.

    torch has no hook for the calls of a custom Function: while the context lasts, its ``apply`` is
    replaced. An ``apply`` that the model took out of its class before keeps its own backward.
    """
    function: Any = torch.autograd.Function
    before = function.__dict__["apply"]
    function.apply = classmethod(_watched(before))
    try:
        with _StraightThrough():
            yield
    finally:
        function.apply = before
