"""Rules of layers with weights: linear layers, convolutions, BatchNorm.

They act on each image separately; a BatchNorm that uses its batch's statistics has no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments import weights
from .intervals import Interval
from .linear_bounds import FEW, Affine, Normed, moved
from .registry import NoRule, register_rule
from .training import TrainInterval

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Roundings of a BatchNorm: mean, variance, root and product, in any arrangement.
_NORM = 16


def train_linear(_call: Any, x: TrainInterval, weight: Tensor, bias: Any = None) -> TrainInterval:
    return TrainInterval(F.linear(x.center, weight, bias), F.linear(x.radius, weight.abs()),
                         (weight, x) if x.center.dim() == 2 else None)


@register_rule(F.linear, training=train_linear)
def linear(x: Interval, weight: Any, bias: Any = None) -> Interval:
    return _linear(x, weight, bias).interval()


def _linear(x: Interval, weight: Any, bias: Any) -> Affine:
    w = weights(weight)
    return Affine((x,), lambda v: F.linear(v, w.to(v.dtype)),
                  lambda v: F.linear(v, w.abs().to(v.dtype)),
                  None if bias is None else weights(bias), w.shape[1] + FEW,
                  squares=lambda v: F.linear(v, w.to(v.dtype).square()))


def train_convolution(convolve: Any, x: TrainInterval, weight: Tensor, bias: Any = None,
                      *args: Any, **kwargs: Any) -> TrainInterval:
    return TrainInterval(convolve(x.center, weight, bias, *args, **kwargs),
                         convolve(x.radius, weight.abs(), None, *args, **kwargs))


def _convolution_rule(d: int) -> Callable[..., Interval]:
    def convolution(x: Interval, weight: Any, *args: Any, **kwargs: Any) -> Interval:
        return _convolution(d, x, weight, *args, **kwargs).interval()
    return convolution


for _d in (1, 2, 3):
    register_rule(getattr(F, f"conv{_d}d"), training=train_convolution)(_convolution_rule(_d))


def _convolution(
    d: int,
    x: Interval,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Affine:
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


def train_layer(m: Any, x: TrainInterval) -> TrainInterval:
    if isinstance(m, nn.Linear):
        return train_linear(m, x, m.weight, m.bias)
    # _conv_forward also pads by repeating pixels, where the layer does
    return TrainInterval(m._conv_forward(x.center, m.weight, m.bias),
                         m._conv_forward(x.radius, m.weight.abs(), None))


@register_rule(*LAYERS, training=train_layer)
def layer(m: Any, x: Interval) -> Interval:
    """Return the interval of a linear or convolutional layer."""
    return _layer(m, x).interval()


def _layer(m: Any, x: Interval) -> Affine:
    if isinstance(m, nn.Linear):
        return _linear(x, m.weight, m.bias)
    padding = m.padding
    if m.padding_mode != "zeros":
        # It repeats pixels: values are moved, but not injectively.
        x = moved(x, lambda v: F.pad(v, m._reversed_padding_repeated_twice, m.padding_mode),
                  injective=False)
        padding = 0
    return _convolution(m.weight.dim() - 2, x, m.weight, m.bias, m.stride, padding, m.dilation,
                        m.groups)


def train_batch_norm_layer(m: _BatchNorm, x: TrainInterval) -> TrainInterval:
    """Normalise by running statistics, or in training mode by those of the centers."""
    if m.training or m.running_mean is None or m.running_var is None:
        rest = [d for d in range(x.center.dim()) if d != 1]
        variance, mean = torch.var_mean(x.center, rest, correction=0)
        _update_statistics(m, mean.detach(), variance.detach(), x.center.numel() // len(mean))
    else:
        mean, variance = m.running_mean, m.running_var
    return _normalised(x, mean, variance, m.weight, m.bias, m.eps)


@torch.no_grad()
def _update_statistics(m: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics as torch's own forward does."""
    if not (m.training and m.track_running_stats) or m.running_mean is None \
            or m.running_var is None:
        return
    share = m.momentum
    if m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
        if share is None:
            share = 1 / float(m.num_batches_tracked)
    m.running_mean.lerp_(mean, share or 0.0)
    m.running_var.lerp_(variance * (count / max(count - 1, 1)), share or 0.0)


def _normalised(x: TrainInterval, mean: Tensor, variance: Tensor, weight: Tensor | None,
                bias: Tensor | None, eps: float) -> TrainInterval:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1] + [1] * (x.center.dim() - 2)
    return TrainInterval(torch.addcmul(shift.view(shape), x.center, scale.view(shape)),
                         x.radius * scale.abs().view(shape))


def train_batch_norm(
    _call: Any,
    x: TrainInterval,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> TrainInterval:
    """Normalise by running statistics: graphs are traced in eval mode, where these are fixed."""
    if training or running_mean is None or running_var is None:
        raise NoRule("a BatchNorm that uses its batch's statistics")
    return _normalised(x, running_mean, running_var, weight, bias, eps)


@register_rule(F.batch_norm, training=train_batch_norm)
def batch_norm(
    x: Interval,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    if training:
        raise NoRule("a BatchNorm that uses its batch's statistics")
    scale, shift, size = _norm(len(x.shape), running_mean, running_var, weight, bias, eps)
    return Affine((x,), lambda v: v * scale.to(v.dtype), lambda v: v * scale.abs().to(v.dtype),
                  shift, _NORM, weight_of_bias=size, diagonal=True).interval()


register_rule(*NORMS, training=train_batch_norm_layer,
              attributes="running_mean running_var weight bias eps")(batch_norm)


def normed(m: Any, norm: Any, x: Interval) -> Interval:
    """Return the interval of a layer and the only BatchNorm that reads it, as one map."""
    scale_shift_size = _norm(len(x.shape), norm.running_mean, norm.running_var, norm.weight,
                             norm.bias, norm.eps)
    return Normed(_layer(m, x), *scale_shift_size, _NORM).interval()


def _norm(dims: int, running_mean: Any, running_var: Any, weight: Any, bias: Any,
          eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a BatchNorm's factor, its shift, and what the shift's rounding is relative to."""
    if running_mean is None or running_var is None:
        raise NoRule("a BatchNorm that uses its batch's statistics")
    mean, scale = weights(running_mean).double(), (weights(running_var).double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weights(weight)
    shift = torch.zeros_like(mean) if bias is None else weights(bias).double()
    shape = (-1, *[1] * (dims - 2))
    scale, mean, shift = (v.reshape(shape) for v in (scale, mean, shift))
    return scale, shift - mean * scale, shift.abs() + (mean * scale).abs()
