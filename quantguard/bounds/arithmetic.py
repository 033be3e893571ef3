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
from torch import Tensor, nn

from .boxes import Box
from .steps import Affine, Normed

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
    return Affine((x,), lambda v: v * factor.to(v.dtype), lambda v: v * factor.abs().to(v.dtype),
                  terms=FEW, diagonal=same).box()


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
    return _linear(x, weight, bias).box()


def _linear(x: Box, weight: Any, bias: Any) -> Affine:
    w = weights(weight)
    return Affine((x,), lambda v: F.linear(v, w.to(v.dtype)),
                  lambda v: F.linear(v, w.abs().to(v.dtype)),
                  None if bias is None else weights(bias), w.shape[1] + FEW,
                  squares=lambda v: F.linear(v, w.to(v.dtype).square()))


def weights(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise NoRule("weights that depend on the image")
    return value.detach()


def convolution(d: int) -> Callable[..., Box]:
    def conv(x: Box, weight: Any, *args: Any, **settings: Any) -> Box:
        return _convolution(d, x, weight, *args, **settings).box()
    return conv


def _convolution(d: int, x: Box, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                 dilation: Any = 1, groups: int = 1) -> Affine:
    convolve: Any = getattr(F, f"conv{d}d")
    if len(x.shape) != d + 2:
        raise NoRule("an image without a batch dimension")
    w = weights(weight)

    def by(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def apply(v: Tensor) -> Tensor:
            result: Tensor = convolve(v, change(w.to(v.dtype)), None, stride, padding, dilation,
                                      groups)
            return result
        return apply
    return Affine((x,), by(lambda kernel: kernel), by(torch.abs),
                  None if bias is None else weights(bias).reshape(-1, *[1] * d),
                  w[0].numel() + FEW, squares=by(torch.square))


def layer(m: Any, x: Box) -> Box:
    """Return the box of a linear or convolutional layer."""
    return _layer(m, x).box()


def _layer(m: Any, x: Box) -> Affine:
    if isinstance(m, nn.Linear):
        return _linear(x, m.weight, m.bias)
    padding = m.padding
    if m.padding_mode != "zeros":
        # Repeats pixels: a move, but no injective one.
        x = moved(x, lambda v: F.pad(v, m._reversed_padding_repeated_twice, m.padding_mode),
                  injective=False)
        padding = 0
    return _convolution(m.weight.dim() - 2, x, m.weight, m.bias, m.stride, padding, m.dilation,
                        m.groups)


def batch_norm(x: Box, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Box:
    if training:
        raise NoRule("a BatchNorm that looks at its batch")
    scale, shift, size = _norm(len(x.shape), running_mean, running_var, weight, bias, eps)
    return Affine((x,), lambda v: v * scale.to(v.dtype), lambda v: v * scale.abs().to(v.dtype),
                  shift, _NORM, weight_of_bias=size, diagonal=True).box()


def normed(m: Any, norm: Any, x: Box) -> Box:
    """Return the box of a BatchNorm of a layer, in one: nothing else reads the layer's output."""
    told = _norm(len(x.shape), norm.running_mean, norm.running_var, norm.weight, norm.bias,
                 norm.eps)
    return Normed(_layer(m, x), *told, _NORM).box()


def _norm(dims: int, running_mean: Any, running_var: Any, weight: Any, bias: Any,
          eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a BatchNorm's factor, its shift, and what the shift's rounding is relative to."""
    if running_mean is None or running_var is None:
        raise NoRule("a BatchNorm that looks at its batch")
    mean, scale = weights(running_mean).double(), (weights(running_var).double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weights(weight)
    shift = torch.zeros_like(mean) if bias is None else weights(bias).double()
    shape = (-1, *[1] * (dims - 2))
    scale, mean, shift = (v.reshape(shape) for v in (scale, mean, shift))
    return scale, shift - mean * scale, shift.abs() + (mean * scale).abs()


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
