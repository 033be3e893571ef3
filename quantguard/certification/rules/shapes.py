"""Rules of operations that only move values: reshapes, slices, concatenation, padding, identity."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import dims_of, float32
from .intervals import Interval
from .linear_bounds import Affine, moved
from .registry import NoRule, register_rule
from .training import TrainInterval, nonnegative_linear, unchanged


def _reshaped(x: Interval, like: Callable[[Tensor], Tensor]) -> Interval:
    """Return the interval in the shape that like gives it, for any number of images."""
    shape = like(x.lower).shape
    if not shape or shape[0] != x.shape[0]:
        raise NoRule("a reshape that mixes images")
    return moved(x, lambda v: v.reshape(v.shape[0], *shape[1:]))


@register_rule(nn.Flatten, torch.flatten, "flatten", training=nonnegative_linear,
               attributes="start_dim end_dim", view=True)
def flatten(x: Interval, start_dim: int = 0, end_dim: int = -1) -> Interval:
    return _reshaped(x, lambda v: v.flatten(start_dim, end_dim))


@register_rule(nn.Unflatten, training=nonnegative_linear, attributes="dim unflattened_size",
               view=True)
def unflatten(x: Interval, dim: Any, unflattened_size: Any) -> Interval:
    return _reshaped(x, lambda v: torch.unflatten(v, dim, unflattened_size))


@register_rule(torch.reshape, "view", "reshape", training=nonnegative_linear, view=True)
def view(x: Interval, *shape: Any) -> Interval:
    if any(isinstance(s, torch.dtype) for s in shape):
        raise NoRule("a view as another type")
    return _reshaped(x, lambda v: v.reshape(*shape))


@register_rule(torch.permute, "permute", training=nonnegative_linear, view=True)
def permute(x: Interval, *dims: Any) -> Interval:
    order = [d % len(x.shape) for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    if order[0] != 0:
        raise NoRule("a permutation that moves the dimension of images")
    return moved(x, lambda v: v.permute(order))


@register_rule(torch.transpose, "transpose", training=nonnegative_linear, view=True)
def transpose(x: Interval, dim0: int, dim1: int) -> Interval:
    first, second = dims_of((dim0, dim1), x)
    return moved(x, lambda v: v.transpose(first, second))


@register_rule(torch.squeeze, "squeeze", training=nonnegative_linear, view=True)
def squeeze(x: Interval, dim: Any = None) -> Interval:
    ones = [d for d in range(1, len(x.shape)) if x.shape[d] == 1]
    dims = ones if dim is None else dims_of(dim, x)
    return _reshaped(x, lambda v: v.squeeze(tuple(dims)))


@register_rule(torch.unsqueeze, "unsqueeze", training=nonnegative_linear, view=True)
def unsqueeze(x: Interval, dim: int) -> Interval:
    if dim % (len(x.shape) + 1) == 0:
        raise NoRule("a dimension before that of images")
    return _reshaped(x, lambda v: v.unsqueeze(dim))


@register_rule(torch.cat, torch.concat, training=nonnegative_linear)
def cat(tensors: Sequence[Any], dim: int = 0) -> Interval:
    intervals = tuple(tensors)
    if not all(isinstance(v, Interval) for v in intervals):
        raise NoRule("constants among the concatenated tensors")
    (chosen,) = dims_of(dim, intervals[0])

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts, chosen)
    return Affine(intervals, join, join).interval()


@register_rule(torch.split, "split", training=nonnegative_linear, view=True)
def split(x: Interval, size: Any, dim: int = 0) -> tuple[Interval, ...]:
    (chosen,) = dims_of(dim, x)
    count = len(torch.split(x.lower, size, chosen))

    def part(i: int) -> Interval:
        return moved(x, lambda v: torch.split(v, size, chosen)[i])
    return tuple(part(i) for i in range(count))


@register_rule(torch.chunk, "chunk", training=nonnegative_linear, view=True)
def chunk(x: Interval, chunks: int, dim: int = 0) -> tuple[Interval, ...]:
    (chosen,) = dims_of(dim, x)
    return split(x, -(-x.shape[chosen] // chunks), chosen)


def train_item(call: Any, x: Any, index: Any) -> Any:
    return nonnegative_linear(call, x, index) if isinstance(x, TrainInterval) else x[index]


@register_rule(operator.getitem, training=train_item, view=True)
def item(x: Any, index: Any) -> Any:
    if not isinstance(x, Interval):
        return x[index]
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or not (parts[0] is Ellipsis or parts[0] == slice(None)) \
            or not all(p is Ellipsis or type(p) in (int, slice) for p in parts) \
            or len(parts) > len(x.shape):
        raise NoRule("an index over images, or by a tensor")
    return moved(x, lambda v: v[index])


def train_pad(call: Any, x: TrainInterval, pad: Any, mode: str = "constant",
              value: Any = None) -> Any:
    if value:
        raise NoRule("padding with numbers other than 0")
    return nonnegative_linear(call, x, pad, mode)


@register_rule(F.pad, training=train_pad)
def pad(x: Interval, pad: Any, mode: str = "constant", value: Any = None) -> Interval:
    if value or len(pad) > 2 * (len(x.shape) - 1):
        raise NoRule("padding with numbers other than 0, or over images")
    return moved(x, lambda v: F.pad(v, pad, mode), injective=mode == "constant")


@register_rule(nn.ZeroPad2d, training=nonnegative_linear, attributes="padding")
def zero_pad(x: Interval, padding: Any) -> Interval:
    return pad(x, padding)


@register_rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
               nn.FeatureAlphaDropout, training=unchanged, view=True)
def identity_layer(_module: nn.Module, x: Any) -> Any:
    return x


@register_rule("clone", training=unchanged)
@register_rule("contiguous", "detach", "float", training=unchanged, view=True)
def identity(x: Any, *_args: Any, **_kwargs: Any) -> Any:
    return x


@register_rule(F.dropout, F.dropout2d, training=unchanged, view=True)
def dropout(x: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training and p > 0:
        raise NoRule("dropout that is active in eval mode")
    return x


@register_rule("torchvision.ops.stochastic_depth.stochastic_depth", training=nonnegative_linear,
               view=True)
def stochastic_depth(x: Interval, p: float, mode: str, training: bool = True) -> Interval:
    """Return x: in eval mode no branch is dropped."""
    return dropout(x, p, training)


@register_rule("to", training=unchanged, view=True)
def to(x: Interval, *args: Any, **kwargs: Any) -> Interval:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (torch.dtype, Tensor)):
            float32(getattr(value, "dtype", value))
    return x
