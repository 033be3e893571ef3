"""Rules of arithmetic: sums, products, quotients, and sums and means over dimensions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import constant, dims_of, float32
from .intervals import Interval
from .linear_bounds import FEW, Affine, averaged
from .registry import NoRule, register_rule
from .training import TrainInterval, between, nonnegative_linear, part


def _shape_with(x: Interval, number: Tensor) -> torch.Size:
    """Return the shape of one image of x combined with a constant."""
    return (x.lower[0] + number).shape


def _scaled(x: Interval, factor: Tensor) -> Interval:
    same = _shape_with(x, factor) == x.shape[1:]
    return Affine((x,), lambda v: v * factor.to(v.dtype), lambda v: v * factor.abs().to(v.dtype),
                  terms=FEW, diagonal=same).interval()


def _shifted(x: Interval, shift: Tensor) -> Interval:
    shape = _shape_with(x, shift)

    def linear(v: Tensor) -> Tensor:
        return v.expand(v.shape[0], *shape)
    if len(shape) != len(x.shape) - 1:
        raise NoRule("a constant of more dimensions")
    return Affine((x,), linear, linear, shift, FEW, diagonal=shape == x.shape[1:]).interval()


def train_add(_call: Any, x: Any, y: Any, alpha: Any = 1) -> TrainInterval:
    center = part("center", x) + alpha * part("center", y)
    radius: Any = 0.0
    if isinstance(x, TrainInterval):
        radius = radius + x.radius
    if isinstance(y, TrainInterval):
        radius = radius + abs(alpha) * y.radius
    return TrainInterval(center, radius.expand(center.shape))


@register_rule(operator.add, operator.iadd, torch.add, "add", "add_", training=train_add)
def add(x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return add(x, mul(y, alpha) if isinstance(y, Interval) else y * alpha)
    if not isinstance(x, Interval):
        x, y = y, x
    if not isinstance(y, Interval):
        return _shifted(x, constant(y, x))
    if len(x.shape) != len(y.shape):
        raise NoRule("a sum of tensors of different dimensions")
    return Affine((x, y), torch.add, torch.add, terms=FEW).interval()


def train_sub(call: Any, x: Any, y: Any, alpha: Any = 1) -> TrainInterval:
    return train_add(call, x, y, -alpha)


@register_rule(operator.sub, operator.isub, torch.sub, "sub", "sub_", training=train_sub)
def sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    if not isinstance(y, Interval):
        return add(x, -constant(y, x) * alpha)
    return add(x, neg(y), alpha)


def train_neg(_call: Any, x: TrainInterval) -> TrainInterval:
    return TrainInterval(-x.center, x.radius)


@register_rule(operator.neg, torch.neg, "neg", training=train_neg)
def neg(x: Interval) -> Interval:
    return _scaled(x, constant(-1, x))


def train_mul(_call: Any, x: Any, y: Any) -> TrainInterval:
    if not isinstance(x, TrainInterval):
        x, y = y, x
    if not isinstance(y, TrainInterval):
        return TrainInterval(x.center * y, x.radius * abs(y))
    products = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    return between(products.amin(0), products.amax(0))


@register_rule(operator.mul, operator.imul, torch.mul, "mul", "mul_", training=train_mul)
def mul(x: Any, y: Any) -> Any:
    if not isinstance(x, Interval):
        x, y = y, x
    if not isinstance(y, Interval):
        return _scaled(x, constant(y, x))
    # Both factors vary: extremes are at corners, and dependence between them is ignored.
    if len(x.shape) != len(y.shape):
        raise NoRule("a product of tensors of different dimensions")
    products = [a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
    lower, upper = (_fold(f, products) for f in (torch.minimum, torch.maximum))
    rounded = _scaled(Interval(lower, upper), constant(1, x))
    return Interval(rounded.lower, rounded.upper)


def _fold(f: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    result, *rest = parts
    for value in rest:
        result = f(result, value)
    return result


def train_div(_call: Any, x: Any, y: Any) -> TrainInterval:
    if isinstance(y, TrainInterval):
        raise NoRule("a division by something that is not a constant")
    return TrainInterval(x.center / y, x.radius / abs(y))


@register_rule(operator.truediv, operator.itruediv, torch.div, "div", "div_", training=train_div)
def div(x: Any, y: Any, rounding_mode: Any = None) -> Any:
    if not isinstance(x, Interval) or isinstance(y, Interval) or rounding_mode is not None:
        raise NoRule("a division by something that is not a constant")
    return _scaled(x, 1 / constant(y, x))


@register_rule(torch.mean, "mean", training=nonnegative_linear)
def mean(x: Interval, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    float32(dtype)
    dims = dims_of(dim, x)
    return averaged(x, lambda v: v.mean(dims, keepdim), math.prod(x.shape[d] for d in dims))


@register_rule(torch.sum, "sum", training=nonnegative_linear)
def total(x: Interval, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Interval:
    float32(dtype)
    dims = dims_of(dim, x)
    return averaged(x, lambda v: v.sum(dims, keepdim), math.prod(x.shape[d] for d in dims))
