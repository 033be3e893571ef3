"""Rules of pooling, and of what only moves values: reshapes, slices, concatenation, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import NoRule, averaged, dims_of, float32, moved
from .boxes import Box
from .steps import Affine, Largest


def average_pool(d: int) -> Callable[..., Box]:
    average: Any = getattr(F, f"avg_pool{d}d")

    def pool(x: Box, kernel_size: Any, stride: Any = None, padding: Any = 0,
             ceil_mode: bool = False, count_include_pad: bool = True,
             divisor_override: Any = None) -> Box:
        if len(x.shape) != d + 2:
            raise NoRule("an image without a batch dimension")
        if divisor_override is not None and divisor_override < 0:
            raise NoRule("a negative divisor")
        stride = kernel_size if stride is None else stride
        settings = (kernel_size, stride, padding, ceil_mode, count_include_pad)
        more = () if d == 1 else (divisor_override,)
        terms = math.prod(kernel_size) if isinstance(kernel_size, (tuple, list)) else kernel_size**d
        return averaged(x, lambda v: average(v, *settings, *more), terms)
    return pool


def adaptive_average(d: int) -> Callable[..., Box]:
    average: Any = getattr(F, f"adaptive_avg_pool{d}d")

    def pool(x: Box, output_size: Any) -> Box:
        if len(x.shape) != d + 2:
            raise NoRule("an image without a batch dimension")
        sizes = average(x.lower[:1], output_size).shape[2:]
        terms = math.prod(a // b + 2 for a, b in zip(x.shape[2:], sizes, strict=True))
        return averaged(x, lambda v: average(v, output_size), terms)
    return pool


def max_pool(d: int, name: str) -> Callable[..., Box]:
    function: Any = getattr(F, f"{name}{d}d")

    def largest(x: Box, *args: Any, **settings: Any) -> Box:
        if settings.pop("return_indices", False) or len(x.shape) != d + 2:
            raise NoRule("a pool with indices, or of one image without a batch dimension")

        def pool(v: Tensor) -> Tensor:
            result: Tensor = function(v, *args, **settings)
            return result
        lower, upper = pool(x.lower), pool(x.upper)
        if bool((lower == -math.inf).any()):
            raise NoRule("a window that lies in the padding alone")
        return Box(lower, upper, Largest(x, pool, upper))
    return largest


def extreme(dims: Callable[..., Tensor]) -> Callable[..., Box]:
    def rule(x: Box, dim: Any = (), keepdim: bool = False) -> Box:
        chosen = dims_of(dim, x)
        return Box(dims(x.lower, chosen, keepdim), dims(x.upper, chosen, keepdim))
    return rule


def reshaped(x: Box, like: Callable[[Tensor], Tensor]) -> Box:
    """Return the box in the shape that like gives it; the map works for any number of images."""
    shape = like(x.lower).shape
    if not shape or shape[0] != x.shape[0]:
        raise NoRule("a reshape that mixes images")
    return moved(x, lambda v: v.reshape(v.shape[0], *shape[1:]))


def flatten(x: Box, start_dim: int = 0, end_dim: int = -1) -> Box:
    return reshaped(x, lambda v: v.flatten(start_dim, end_dim))


def view(x: Box, *shape: Any) -> Box:
    if any(isinstance(s, torch.dtype) for s in shape):
        raise NoRule("a view as another type")
    return reshaped(x, lambda v: v.reshape(*shape))


def permute(x: Box, *dims: Any) -> Box:
    order = [d % len(x.shape) for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    if order[0] != 0:
        raise NoRule("a permutation that moves the dimension of images")
    return moved(x, lambda v: v.permute(order))


def transpose(x: Box, dim0: int, dim1: int) -> Box:
    first, second = dims_of((dim0, dim1), x)
    return moved(x, lambda v: v.transpose(first, second))


def squeeze(x: Box, dim: Any = None) -> Box:
    ones = [d for d in range(1, len(x.shape)) if x.shape[d] == 1]
    dims = ones if dim is None else dims_of(dim, x)
    return reshaped(x, lambda v: v.squeeze(tuple(dims)))


def unsqueeze(x: Box, dim: int) -> Box:
    if dim % (len(x.shape) + 1) == 0:
        raise NoRule("a dimension before that of images")
    return reshaped(x, lambda v: v.unsqueeze(dim))


def cat(tensors: Sequence[Any], dim: int = 0) -> Box:
    boxes = tuple(tensors)
    if not all(isinstance(b, Box) for b in boxes):
        raise NoRule("constants beside values")
    (chosen,) = dims_of(dim, boxes[0])

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts, chosen)
    return Affine(boxes, join, join).box()


def split(x: Box, size: Any, dim: int = 0) -> tuple[Box, ...]:
    (chosen,) = dims_of(dim, x)
    count = len(torch.split(x.lower, size, chosen))


    def part(i: int) -> Box:
        return moved(x, lambda v: torch.split(v, size, chosen)[i])
    return tuple(part(i) for i in range(count))


def chunk(x: Box, chunks: int, dim: int = 0) -> tuple[Box, ...]:
    (chosen,) = dims_of(dim, x)
    return split(x, -(-x.shape[chosen] // chunks), chosen)


def item(x: Any, index: Any) -> Any:
    if not isinstance(x, Box):
        return x[index]
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or not (parts[0] is Ellipsis or parts[0] == slice(None)) \
            or not all(p is Ellipsis or type(p) in (int, slice) for p in parts) \
            or len(parts) > len(x.shape):
        raise NoRule("an index over images, or by a tensor")
    return moved(x, lambda v: v[index])


def pad(x: Box, pad: Any, mode: str = "constant", value: Any = None) -> Box:
    if value or len(pad) > 2 * (len(x.shape) - 1):
        raise NoRule("padding with numbers other than 0, or over images")
    return moved(x, lambda v: F.pad(v, pad, mode), injective=mode == "constant")


def as_it_is(x: Any, *_args: Any, **_settings: Any) -> Any:
    return x


def dropout(x: Box, p: float = 0.5, training: bool = True, inplace: bool = False) -> Box:
    if training and p > 0:
        raise NoRule("dropout that is on in eval mode")
    return x


def stochastic_depth(x: Box, p: float, mode: str, training: bool = True) -> Box:
    """Return x: in eval mode no branch is dropped."""
    return dropout(x, p, training)


def to(x: Box, *args: Any, **settings: Any) -> Box:
    for value in (*args, *settings.values()):
        if isinstance(value, (torch.dtype, Tensor)):
            float32(getattr(value, "dtype", value))
    return x
