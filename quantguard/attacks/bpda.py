"""BPDA: gradients through rounding, signs, comparisons and Functions with a zero backward.

Two ways, which an attacker is free to use (backward pass differentiable approximation: Athalye,
Carlini, Wagner 2018, arXiv:1802.00420, section 4.1):

- Without a sharpness, a straight-through estimator (Bengio, Leonard, Courville 2013,
  arXiv:1308.3432): the forward does not change, only the backward of operations whose gradient is
  zero.
- With a sharpness k, operations are softened like our own quantizers. A sign becomes a tanh, a
  comparison a logistic function, and any other operation its mean over a window around x that
  shrinks with k.

A comparison returns booleans, which cannot have a gradient. It is only softened, never
straight-through, and only for operations that compute with its result (products, sums,
``torch.where``, casts to float); indexing, filling and branching get the booleans.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .bpda_functions import (
    FunctionInput,
    FunctionOutput,
    StraightThrough,
    is_elementwise_and_flat,
    rms_size,
    window_mean,
)
from .numbered_calls import custom_function
from .site_softener import SiteSoftener
from .step_functions import median_distance
from .step_sites import Site

_ROUNDINGS = {"round", "floor", "ceil", "trunc", "fix"}
_SIGNS = {"sign", "sgn"}
# Whether a comparison is true where its first operand is larger.
_COMPARISONS = {"gt": True, "ge": True, "greater": True, "greater_equal": True,
                "lt": False, "le": False, "less": False, "less_equal": False}
# Operations on softened comparisons whose result is one, too.
_NOT = {"invert", "logical_not", "bitwise_not"}
_BOTH = {"and", "or", "logical_and", "logical_or", "bitwise_and", "bitwise_or"}
_SHAPES = {"unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "permute", "transpose",
           "flatten", "repeat", "contiguous", "clone"}
# Operations that compute with softened comparisons as numbers.
_NUMBERS = {"mul", "rmul", "imul", "multiply", "add", "radd", "iadd", "sub", "rsub", "sum", "mean",
            "float", "half", "double", "bfloat16", "to", "type", "type_as", "matmul", "rmatmul"}


class BpdaMode(SiteSoftener):
    """Mode that gives non-differentiable operations a gradient, and softens known sites.

    Args:
        k: sharpness of softened operations; None: straight-through estimators.
        sites, by_image, slope: as of :class:`quantguard.attacks.site_softener.SiteSoftener`.

    Attributes:
        met: whether there was such an operation.
    """

    def __init__(self, k: float | None, sites: Sequence[Site], by_image: bool,
                 slope: float | None) -> None:
        super().__init__(sites, k, by_image, slope)
        self.met = bool(sites)
        # Softened comparisons that are alive, by id: ids are used again after a tensor's end.
        self._soft: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def _is_soft(self, x: Any) -> bool:
        return isinstance(x, Tensor) and self._soft.get(id(x)) is x

    def _mark_soft(self, x: Tensor) -> Tensor:
        self._soft[id(x)] = x
        return x

    def _soft_comparison(self, name: str, x: Any, y: Any) -> Tensor | None:
        """Return x > y or x < y softened; None: neither is a tensor with a gradient."""
        if not any(isinstance(v, Tensor) and v.requires_grad and v.is_floating_point() and v.dim()
                   for v in (x, y)):
            return None
        gap = x - y if _COMPARISONS[name] else y - x
        return self._mark_soft(torch.sigmoid(gap * ((self.k or 1.0) / median_distance(gap))))

    def _with_soft_arguments(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function whose arguments contain softened comparisons, as numbers or booleans."""
        if name in _NOT:
            return self._mark_soft(1 - args[0])
        if name in _BOTH and all(map(self._is_soft, args)):
            both = args[0] * args[1]
            return self._mark_soft(both if "and" in name else args[0] + args[1] - both)
        if name == "where" and len(args) == 3 and self._is_soft(args[0]):
            c = args[0]
            a, b = (torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else c.dtype,
                                    device=c.device) for v in args[1:])
            finite = a.isfinite() & b.isfinite()  # infinities are masks, which cannot be mixed
            mixed = c * torch.where(finite, a, 0) + (1 - c) * torch.where(finite, b, 0)
            return torch.where(finite, mixed, torch.where(c.detach() > 0.5, a, b))
        if name in _SHAPES:
            return self._mark_soft(func(*args, **kwargs))
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
        """Execute a call: unchanged, softened, or straight-through."""
        if self.inside_site(number):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").rstrip("_")
        if self.k is not None and torch.is_grad_enabled():
            plain = name.strip("_")
            if plain in _COMPARISONS and len(args) == 2 and not kwargs:
                comparison = self._soft_comparison(plain, *args)
                if comparison is not None:
                    self.met = True
                    return comparison
            inside = [v for value in args
                      for v in (value if isinstance(value, (tuple, list)) else [value])]
            if self._soft and any(map(self._is_soft, inside)):
                return self._with_soft_arguments(func, plain, args, kwargs)
        flat = name in _ROUNDINGS or name in _SIGNS
        if not (flat and args and isinstance(args[0], Tensor) and args[0].requires_grad
                and torch.is_grad_enabled()) or "out" in kwargs:
            return func(*args, **kwargs)
        x, operation = args[0], getattr(torch, name)
        self.met = True
        if self.k is not None and x.dim():
            if name in _SIGNS:
                z = torch.tanh(x * (self.k / 2 / median_distance(x)))
            else:
                # At least one rounding step. With exactly one, where x spans several, more images
                # survive: 60 of 100 on a LeNet with steps of a quarter, not 54.
                scale = rms_size(x).clamp_min(10.0 ** -kwargs.get("decimals", 0))
                z = window_mean(x, lambda v: operation(v, *args[1:], **kwargs), self.k, scale)
        else:
            with torch.no_grad():
                y = operation(*args, **kwargs)
            z = StraightThrough.apply(x, y, name in _SIGNS)
        return x.copy_(z) if func.__name__.endswith("_") else z


def _patched_apply(apply: Any, mode: BpdaMode) -> Callable[..., Any]:
    """Return a ``Function.apply`` that replaces zero gradients of custom Functions."""
    flat: dict[Any, bool] = {}

    def patched(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        plain = apply.__get__(None, cls)
        if not custom_function(cls) or mode.hidden:
            return plain(*args, **kwargs)
        unchanged = mode.inside_site(mode.number) or not tensors or not torch.is_grad_enabled()

        def apply_one(*args: Any, **kwargs: Any) -> Any:
            if unchanged:
                return plain(*args, **kwargs)
            return with_gradient(cls, plain, tensors, args, kwargs)
        return mode.apply_function(cls, apply_one, args, kwargs)

    def with_gradient(cls: Any, plain: Callable[..., Any], tensors: list[int], args: Any,
                      kwargs: Any) -> Any:
        at = tensors[0]

        def call(x: Tensor) -> Any:
            return plain(*args[:at], x, *args[at + 1:], **kwargs)
        if mode.k is not None and len(tensors) == 1:
            if cls not in flat:
                flat[cls] = is_elementwise_and_flat(call, args[at])
            if flat[cls]:
                mode.met = True
                return window_mean(args[at], call, mode.k, rms_size(args[at]))
        shared: dict[str, Tensor] = {}
        y = call(FunctionInput.apply(args[at], shared))
        if isinstance(y, Tensor) and y.shape == args[at].shape and y.is_floating_point() \
                and y.requires_grad:
            return FunctionOutput.apply(y, shared)
        return y
    return patched


@contextmanager
def straight_through(k: float | None = None,
                     sites: Sequence[Site] = (),
                     by_image: bool = False,
                     slope: float | None = None) -> Iterator[BpdaMode]:
    """Give non-differentiable operations a gradient, in the context.

    torch has no hook for calls of a custom Function: ``Function.apply`` is replaced in the context.
    An ``apply`` that the model has bound to a name before keeps its own backward.

    Args:
        k: sharpness of softened operations, as in :func:`quantguard.soften`; None: values do not
            change, and gradients are straight-through.
        sites: known quantizers, see :func:`quantguard.attacks.step_sites.find_sites`; the forward
            has to run in ``counting_from`` of the yielded mode.
        by_image: as of :func:`quantguard.soften`, for these quantizers.
        slope: as of :class:`quantguard.attacks.site_softener.SiteSoftener`.

    Yields:
        The mode, whose ``met`` is whether there was such an operation.
    """
    function: Any = torch.autograd.Function
    before, mode = function.__dict__["apply"], BpdaMode(k, sites, by_image, slope)
    function.apply = classmethod(_patched_apply(before, mode))
    try:
        with mode:
            yield mode
    finally:
        function.apply = before


def has_nondifferentiable(model: nn.Module, x: Tensor, sites: Sequence[Site] = (),
                          begin: nn.Module | None = None) -> bool:
    """Return whether a model contains operations that can be softened.

    If the model does not run with softened operations, which it uses as indices, say, it has none.
    """
    with torch.enable_grad(), straight_through(8.0, sites) as mode, \
            mode.counting_from(begin or model) if sites else nullcontext():
        try:
            model(x.detach().requires_grad_())
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
    return mode.met
