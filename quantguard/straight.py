"""A gradient through foreign steps while attacking: rounding, signs, Functions that give zeros.

Straight-through, what the model computes does not change, only the backward of what has a zero
gradient (Bengio, Leonard, Courville 2013, arXiv:1308.3432), which an attacker may take as well as
anyone (backward pass differentiable approximation, Athalye, Carlini, Wagner 2018, arXiv:1802.00420,
section 4.1). With a sharpness k the step is softened as our own staircases are: a sign is tanh, a
comparison a logistic function, any other step its mean over a window around x that shrinks with k,
with the mean's own gradient.

A comparison puts out booleans, which have no gradient to go straight through: it is only softened,
and only for what computes with its result (products, sums, ``torch.where``, casts to float); who
indexes, fills or branches by it gets booleans.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .step_fit import median_distance
from .step_sites import Site, SiteReader, foreign_function

_ROUNDINGS = {"round", "floor", "ceil", "trunc", "fix"}
_SIGNS = {"sign", "sgn"}
# Whether a comparison is true where its first operand is larger.
_COMPARISONS = {"gt": True, "ge": True, "greater": True, "greater_equal": True,
                "lt": False, "le": False, "less": False, "less_equal": False}
_NOT = {"invert", "logical_not", "bitwise_not"}
_BOTH = {"and", "or", "logical_and", "logical_or", "bitwise_and", "bitwise_or"}
_SHAPES = {"unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "permute", "transpose",
           "flatten", "repeat", "contiguous", "clone"}
_NUMBERS = {"mul", "rmul", "imul", "multiply", "add", "radd", "iadd", "sub", "rsub", "sum", "mean",
            "float", "half", "double", "bfloat16", "to", "type", "type_as", "matmul", "rmatmul"}
# Places in its window at which a softened step is looked at.
_PLACES = 8
# Half of the window at k = 1, over the scale: as much of a spread as the logistic's.
_HALF = 3.0


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


class _Soft(torch.autograd.Function):
    """Compute the mean of f over a window of half-width h around x, and its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        places = (torch.arange(_PLACES, device=x.device) + 0.5) * (2 / _PLACES) - 1
        ctx.save_for_backward((f(x + h) - f(x - h)) / (2 * h))
        return torch.stack([f(x + h * float(place)) for place in places]).mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None


# The two scales were chosen on a LeNet, 128 images, by what three or four attacks with k 2 to 128
# leave standing. Layers differ in how sparse they are and in where they lie: a scale that is misled
# by that softens one layer more than the next.
def _size(x: Tensor) -> Tensor:
    """Return each image's root mean square of what is not zero, (N, 1, ...): a rounding's scale.

    With ReLU before it 68 images stand, by the standard deviation, zeros and all, 75.
    """
    rows = _rows(x)
    size = (rows.square().sum(1) / (rows != 0).sum(1).clamp_min(1)).sqrt()
    return size.clamp_min(1e-6).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _rows(x: Tensor) -> Tensor:
    """Return x as (N, values of an image), in a type that holds the sum of their squares."""
    rows = x.detach().flatten(1) if x.dim() > 1 else x.detach().reshape(-1, 1)
    return rows if rows.dtype == torch.float64 else rows.float()


class _StraightThrough(SiteReader):
    def __init__(self, k: float | None, sites: Sequence[Site], by_image: bool,
                 slope: float | None) -> None:
        super().__init__(sites, k, by_image, slope)
        self.met = bool(sites)
        # Softened comparisons that somebody still holds, by id: ids are used again afterwards.
        self.soft: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def _is_soft(self, x: Any) -> bool:
        return isinstance(x, Tensor) and self.soft.get(id(x)) is x

    def _marked(self, x: Tensor) -> Tensor:
        self.soft[id(x)] = x
        return x

    def _compared(self, name: str, x: Any, y: Any) -> Tensor | None:
        """Return x > y or x < y softened; None: there is no gradient in it, or no image."""
        if not any(isinstance(v, Tensor) and v.requires_grad and v.is_floating_point() and v.dim()
                   for v in (x, y)):
            return None
        gap = x - y if _COMPARISONS[name] else y - x
        return self._marked(torch.sigmoid(gap * ((self.k or 1.0) / median_distance(gap))))

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that is given softened comparisons: as numbers, or as booleans."""
        if name in _NOT:
            return self._marked(1 - args[0])
        if name in _BOTH and all(map(self._is_soft, args)):
            both = args[0] * args[1]
            return self._marked(both if "and" in name else args[0] + args[1] - both)
        if name == "where" and len(args) == 3 and self._is_soft(args[0]):
            c = args[0]
            a, b = (torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else c.dtype,
                                    device=c.device) for v in args[1:])
            fine = a.isfinite() & b.isfinite()  # infinity is for masking, not for mixing
            mixed = c * torch.where(fine, a, 0) + (1 - c) * torch.where(fine, b, 0)
            return torch.where(fine, mixed, torch.where(c.detach() > 0.5, a, b))
        if name in _SHAPES:
            return self._marked(func(*args, **kwargs))
        kind = next((v for v in (*args[1:], kwargs.get("dtype")) if isinstance(v, torch.dtype)),
                    torch.float32)
        if name in _NUMBERS and kind.is_floating_point:
            return func(*args, **kwargs)

        def hard(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(hard, value))
            return value.detach() > 0.5 if self._is_soft(value) else value
        return func(*map(hard, args), **{key: hard(value) for key, value in kwargs.items()})

    def run(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry a call out: as it is, softened, or with a gradient that goes straight through."""
        if self.within(number):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").rstrip("_")
        if self.k is not None and torch.is_grad_enabled():
            plain = name.strip("_")
            if plain in _COMPARISONS and len(args) == 2 and not kwargs:
                found = self._compared(plain, *args)
                if found is not None:
                    self.met = True
                    return found
            inside = [v for value in args
                      for v in (value if isinstance(value, (tuple, list)) else [value])]
            if self.soft and any(map(self._is_soft, inside)):
                return self._computed(func, plain, args, kwargs)
        flat = name in _ROUNDINGS or name in _SIGNS
        if not (flat and args and isinstance(args[0], Tensor) and args[0].requires_grad
                and torch.is_grad_enabled()) or "out" in kwargs:
            return func(*args, **kwargs)
        x, step = args[0], getattr(torch, name)
        self.met = True
        if self.k is not None and x.dim():
            if name in _SIGNS:
                z = torch.tanh(x * (self.k / 2 / median_distance(x)))
            else:
                # Not finer than a step; a step's width itself, where x goes through several, leaves
                # more standing: 60 of 100 images on a LeNet with steps of a quarter, not 54.
                width = _size(x).clamp_min(10.0 ** -kwargs.get("decimals", 0))
                z = _Soft.apply(x, lambda v: step(v, *args[1:], **kwargs), _HALF / self.k * width)
        else:
            with torch.no_grad():
                y = step(*args, **kwargs)
            z = _Straight.apply(x, y, name in _SIGNS)
        return x.copy_(z) if func.__name__.endswith("_") else z


def _dead(call: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Return whether a Function is one number to one number, and its backward always zero."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = call(leaf)
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point() \
                or not y.requires_grad or not x.dim():
            return False
        (gradient,) = torch.autograd.grad(y.sum(), leaf, allow_unused=True)
    if gradient is not None and bool(gradient.any()):
        return False
    every_other = torch.arange(x.numel(), device=x.device).reshape(x.shape) % 2 == 0
    with torch.no_grad():
        moved = call(torch.where(every_other, x + _size(x), x))
    return bool((moved == y)[~every_other].all())


def _watched(apply: Any, mode: _StraightThrough) -> Callable[..., Any]:
    """Return ``Function.apply`` that lets no image's gradient vanish in a foreign Function."""
    dead: dict[Any, bool] = {}

    def through(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        plain = apply.__get__(None, cls)
        if not foreign_function(cls) or mode.hidden:
            return plain(*args, **kwargs)
        known = mode.within(mode.number) or not tensors or not torch.is_grad_enabled()

        def helping(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if known else helped(cls, plain, tensors, args, kwargs)
        return mode.applied(cls, helping, args, kwargs)

    def helped(cls: Any, plain: Callable[..., Any], tensors: list[int], args: Any,
               kwargs: Any) -> Any:
        at = tensors[0]

        def call(x: Tensor) -> Any:
            return plain(*args[:at], x, *args[at + 1:], **kwargs)
        if mode.k is not None and len(tensors) == 1:
            if cls not in dead:
                dead[cls] = _dead(call, args[at])
            if dead[cls]:
                mode.met = True
                return _Soft.apply(args[at], call, _HALF / mode.k * _size(args[at]))
        seen: dict[str, Tensor] = {}
        y = call(_In.apply(args[at], seen))
        return _Out.apply(y, seen) if isinstance(y, Tensor) and y.shape == args[at].shape \
            and y.is_floating_point() and y.requires_grad else y
    return through


@contextmanager
def straight_through(k: float | None = None,
                     sites: Sequence[Site] = (),
                     by_image: bool = False,
                     slope: float | None = None) -> Iterator[_StraightThrough]:
    """Give foreign steps a gradient, inside the context.

    torch has no hook for the calls of a custom Function: while the context lasts, its ``apply`` is
    replaced. An ``apply`` that the model took out of its class before keeps its own backward.

    Args:
        k: sharpness of the softened steps, as in :func:`quantguard.soften`; None: the values stay,
            and gradients go straight through.
        sites: quantizers that are known, see :func:`quantguard.step_sites.find_sites`; the forward
            has to be begun, by ``begun_by`` of what is yielded.
        by_image: as of :func:`quantguard.soften`, of these quantizers.
        slope: as of :class:`quantguard.step_sites.SiteReader`.

    Yields:
        An object whose ``met`` says whether there was such a step.
    """
    function: Any = torch.autograd.Function
    before, mode = function.__dict__["apply"], _StraightThrough(k, sites, by_image, slope)
    function.apply = classmethod(_watched(before, mode))
    try:
        with mode:
            yield mode
    finally:
        function.apply = before


def has_foreign_steps(model: nn.Module, x: Tensor, sites: Sequence[Site] = (),
                      begin: nn.Module | None = None) -> bool:
    """Return whether a model goes through steps that can be softened.

    One that does not run with softened steps, since they are indices or the like, has none.
    """
    with torch.enable_grad(), straight_through(8.0, sites) as mode, \
            mode.begun_by(begin or model) if sites else nullcontext():
        try:
            model(x.detach().requires_grad_())
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
    return mode.met
