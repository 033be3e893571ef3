"""Rules of arithmetic: sums, products, linear layers, BatchNorm, means.

A rule takes what the operation takes, boxes in place of tensors, and returns a box. It acts on
each image alone; what mixes images has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import Box
from .steps import Affine

# An operation on two numbers rounds once; scalars are rounded to float32 first, and some kernels
# multiply by a rounded reciprocal.
FEW = 4
# BatchNorm: mean, variance, root and product, in any arrangement.
_NORM = 16


class NoRule(Exception):
    """Say which part of a call has no rule."""


def moved(x: Box, move: Callable[[Tensor], Tensor], injective: bool = True) -> Box:
    """Return the box of values that are only moved, image by image."""
    return Affine((x,), move, move, diagonal=injective).box()


def dims_of(dims: Any, x: Box) -> list[int]:
    """Return dimensions as a list of non-negative numbers, none of them that of the images."""
    some = list(dims) if isinstance(dims, (tuple, list)) else [] if dims is None else [dims]
    found = [d % len(x.shape) for d in some or range(len(x.shape))]
    if 0 in found:
        raise NoRule("an operation across images")
    return found


def _constant(value: Any, x: Box) -> Tensor:
    """Return a number or tensor in double, shaped to go with one image of x."""
    if isinstance(value, Tensor):
        number = value.detach().double()
        if number.dim() >= len(x.shape):
            if number.dim() > len(x.shape) or number.shape[0] != 1:
                raise NoRule("a constant with a row for each image")
            number = number[0]
        return number.to(x.lower.device)
    if not isinstance(value, (int, float)):
        raise NoRule(f"a {type(value).__name__} among its arguments")
    return torch.tensor(float(value), dtype=torch.float64, device=x.lower.device)


def _broadcast(x: Box, constant: Tensor) -> torch.Size:
    """Return the shape of one image of x combined with a constant."""
    return (x.lower[0] + constant).shape


def scaled(x: Box, factor: Tensor) -> Box:
    same = _broadcast(x, factor) == x.shape[1:]
    size = factor.abs()
    return Affine((x,), lambda v: v * factor, lambda v: v * size, terms=FEW, diagonal=same).box()


def _shifted(x: Box, shift: Tensor) -> Box:
    shape = _broadcast(x, shift)

    def linear(v: Tensor) -> Tensor:
        return v.expand(v.shape[0], *shape)
    if len(shape) != len(x.shape) - 1:
        raise NoRule("a constant of more dimensions")
    return Affine((x,), linear, linear, shift, FEW, diagonal=shape == x.shape[1:]).box()


def add(x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return add(x, mul(y, alpha) if isinstance(y, Box) else y * alpha)
    if not isinstance(x, Box):
        x, y = y, x
    if not isinstance(y, Box):
        return _shifted(x, _constant(y, x))
    return _sum(x, y)


def _sum(x: Box, y: Box) -> Box:
    if len(x.shape) != len(y.shape):
        raise NoRule("a sum of tensors of different dimensions")
    return Affine((x, y), torch.add, torch.add, terms=FEW).box()


def sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    if not isinstance(y, Box):
        return add(x, -_constant(y, x) * alpha)
    return add(x, neg(y), alpha)


def neg(x: Box) -> Box:
    return scaled(x, _constant(-1, x))


def mul(x: Any, y: Any) -> Any:
    if not isinstance(x, Box):
        x, y = y, x
    if not isinstance(y, Box):
        return scaled(x, _constant(y, x))
    # Both vary: the extremes are at the corners; what they have in common is not seen.
    if len(x.shape) != len(y.shape):
        raise NoRule("a product of tensors of different dimensions")
    products = [a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
    lower, upper = (_fold(f, products) for f in (torch.minimum, torch.maximum))
    rounded = scaled(Box(lower, upper), _constant(1, x))
    return Box(rounded.lower, rounded.upper)


def _fold(f: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    result, *rest = parts
    for part in rest:
        result = f(result, part)
    return result


def div(x: Any, y: Any, rounding_mode: Any = None) -> Any:
    if not isinstance(x, Box) or isinstance(y, Box) or rounding_mode is not None:
        raise NoRule("a division by what is no constant")
    return scaled(x, 1 / _constant(y, x))


def linear(x: Box, weight: Any, bias: Any = None) -> Box:
    w = weights(weight)
    size, square = w.abs(), w.square()
    return Affine((x,), lambda v: F.linear(v, w), lambda v: F.linear(v, size),
                  None if bias is None else weights(bias), w.shape[1] + FEW,
                  squares=lambda v: F.linear(v, square)).box()


def weights(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise NoRule("weights that depend on the image")
    return value.detach().double()


def convolution(d: int) -> Callable[..., Box]:
    convolve: Any = getattr(F, f"conv{d}d")

    def conv(x: Box, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
             dilation: Any = 1, groups: int = 1) -> Box:
        if len(x.shape) != d + 2:
            raise NoRule("an image without a batch dimension")
        w = weights(weight)

        def by(kernel: Tensor) -> Callable[[Tensor], Tensor]:
            def apply(v: Tensor) -> Tensor:
                result: Tensor = convolve(v, kernel, None, stride, padding, dilation, groups)
                return result
            return apply
        return Affine((x,), by(w), by(w.abs()),
                      None if bias is None else weights(bias).reshape(-1, *[1] * d),
                      w[0].numel() + FEW, squares=by(w.square())).box()
    return conv


def conv_module(d: int) -> Callable[..., Box]:
    rule = convolution(d)

    def conv(m: Any, x: Box) -> Box:
        padding = m.padding
        if m.padding_mode != "zeros":
            # Repeats pixels: a move, but no injective one.
            x = moved(x, lambda v: F.pad(v, m._reversed_padding_repeated_twice, m.padding_mode),
                       injective=False)
            padding = 0
        return rule(x, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)
    return conv


def batch_norm(x: Box, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Box:
    if training or running_mean is None or running_var is None:
        raise NoRule("a BatchNorm that looks at its batch")
    mean, scale = weights(running_mean), (weights(running_var) + eps).rsqrt()
    if weight is not None:
        scale = scale * weights(weight)
    shift = mean.new_zeros(mean.shape) if bias is None else weights(bias)
    shape = (-1, *[1] * (len(x.shape) - 2))
    scale, mean, shift = (v.reshape(shape) for v in (scale, mean, shift))
    size = scale.abs()
    return Affine((x,), lambda v: v * scale, lambda v: v * size, shift - mean * scale, _NORM,
                  weight_of_bias=shift.abs() + (mean * scale).abs(), diagonal=True).box()


def averaged(x: Box, pool: Callable[[Tensor], Tensor], terms: int) -> Box:
    return Affine((x,), pool, pool, terms=terms + FEW).box()


def mean(x: Box, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Box:
    float32(dtype)
    dims = dims_of(dim, x)
    return averaged(x, lambda v: v.mean(dims, keepdim), math.prod(x.shape[d] for d in dims))


def total(x: Box, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Box:
    float32(dtype)
    dims = dims_of(dim, x)
    return averaged(x, lambda v: v.sum(dims, keepdim), math.prod(x.shape[d] for d in dims))


def float32(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise NoRule(f"{dtype}: certificates are for float32")
