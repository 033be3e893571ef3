"""Rules of pooling: maximum, average and adaptive, and extremes over dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import dims_of
from .intervals import Interval
from .linear_bounds import MaxPool, averaged
from .registry import NoRule, register_rule
from .training import nondecreasing, nonnegative_linear


def _average_pool(d: int) -> Callable[..., Interval]:
    average: Any = getattr(F, f"avg_pool{d}d")

    def pool(x: Interval, kernel_size: Any, stride: Any = None, padding: Any = 0,
             ceil_mode: bool = False, count_include_pad: bool = True,
             divisor_override: Any = None) -> Interval:
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


def _adaptive_average_pool(d: int) -> Callable[..., Interval]:
    average: Any = getattr(F, f"adaptive_avg_pool{d}d")

    def pool(x: Interval, output_size: Any) -> Interval:
        if len(x.shape) != d + 2:
            raise NoRule("an image without a batch dimension")
        sizes = average(x.lower[:1], output_size).shape[2:]
        terms = math.prod(a // b + 2 for a, b in zip(x.shape[2:], sizes, strict=True))
        return averaged(x, lambda v: average(v, output_size), terms)
    return pool


def _max_pool(d: int, function: Any) -> Callable[..., Interval]:
    def largest(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        if kwargs.pop("return_indices", False) or len(x.shape) != d + 2:
            raise NoRule("pooling with indices, or of one image without a batch dimension")

        def pool(v: Tensor) -> Tensor:
            result: Tensor = function(v, *args, **kwargs)
            return result
        lower, upper = pool(x.lower), pool(x.upper)
        if bool((lower == -math.inf).any()):
            raise NoRule("a window that lies in the padding only")
        return Interval(lower, upper, MaxPool(x, pool, upper))
    return largest


_AVERAGE = "kernel_size stride padding ceil_mode count_include_pad"
for _d, _average in ((1, _AVERAGE), (2, f"{_AVERAGE} divisor_override")):
    register_rule(getattr(nn, f"AvgPool{_d}d"), getattr(F, f"avg_pool{_d}d"),
                  training=nonnegative_linear, attributes=_average)(_average_pool(_d))
    register_rule(getattr(nn, f"AdaptiveAvgPool{_d}d"), getattr(F, f"adaptive_avg_pool{_d}d"),
                  training=nonnegative_linear, attributes="output_size")(_adaptive_average_pool(_d))
    register_rule(getattr(nn, f"MaxPool{_d}d"), getattr(F, f"max_pool{_d}d"),
                  getattr(torch, f"max_pool{_d}d"), training=nondecreasing,
                  attributes="kernel_size stride padding dilation ceil_mode return_indices",
                  )(_max_pool(_d, getattr(F, f"max_pool{_d}d")))
    register_rule(getattr(nn, f"AdaptiveMaxPool{_d}d"), getattr(F, f"adaptive_max_pool{_d}d"),
                  training=nondecreasing, attributes="output_size return_indices",
                  )(_max_pool(_d, getattr(F, f"adaptive_max_pool{_d}d")))


def _extreme(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    def rule(x: Interval, dim: Any = (), keepdim: bool = False) -> Interval:
        dims = dims_of(dim, x)
        return Interval(function(x.lower, dims, keepdim), function(x.upper, dims, keepdim))
    return rule


register_rule(torch.amax, "amax", training=nondecreasing)(_extreme(torch.amax))
register_rule(torch.amin, "amin", training=nondecreasing)(_extreme(torch.amin))
