"""Rules of intervals in training: what each operation makes of centers and radii.

In real numbers: nothing is added for rounding. A rule takes the operation itself, and its arguments
with intervals in place of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .activation import QuantActivation
from .bounds.curves import turning
from .errors import ConversionError
from .kinds import FUNCTION_KINDS, METHOD_KINDS, MODULE_KINDS, module_of


@dataclass(frozen=True, eq=False)
class Interval:
    """Hold the interval of every element of a tensor, ``center - radius`` to ``center + radius``.

    Attributes:
        center, radius: (N, ...).
        last: weight and input of the linear layer that made it, where one did.
    """

    center: Tensor
    radius: Tensor
    last: tuple[Tensor, Interval] | None = None

    @property
    def lower(self) -> Tensor:
        """Return the lower ends."""
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        """Return the upper ends."""
        return self.center + self.radius


def between(lower: Tensor, upper: Tensor) -> Interval:
    """Return the interval with these ends."""
    return Interval((lower + upper) / 2, (upper - lower) / 2)


def holds_intervals(*values: Any) -> bool:
    """Return whether an interval is among values, however they are nested."""
    found: list[Any] = []
    fx.node.map_aggregate(values, lambda v: found.append(v) if isinstance(v, Interval) else None)
    return bool(found)


def part(name: str, values: Any) -> Any:
    """Return values with that attribute in place of every interval."""
    return fx.node.map_aggregate(
        values, lambda v: getattr(v, name) if isinstance(v, Interval) else v)


def _joined(make: Callable[[Tensor, Tensor], Interval], first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return make(first, second)
    return tuple(make(a, b) for a, b in zip(first, second, strict=True))


def alike(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Send center and radius through the operation: linear, with no weight below 0."""
    return _joined(Interval, call(*part("center", args), **part("center", settings)),
                   call(*part("radius", args), **part("radius", settings)))


def rising(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Send both ends through the operation, which never falls where an input rises."""
    return _joined(between, call(*part("lower", args), **part("lower", settings)),
                   call(*part("upper", args), **part("upper", settings)))


def _as_it_is(_call: Any, x: Interval, *_args: Any, **_settings: Any) -> Interval:
    return x


def _zero_padded(call: Any, x: Interval, pad: Any, mode: str = "constant",
                 value: Any = None) -> Any:
    if value:
        raise ConversionError("padding with numbers other than 0")
    return alike(call, x, pad, mode)


def _linear(_call: Any, x: Interval, weight: Tensor, bias: Any = None) -> Interval:
    return Interval(F.linear(x.center, weight, bias), F.linear(x.radius, weight.abs()),
                    (weight, x) if x.center.dim() == 2 else None)


def _convolved(convolve: Any, x: Interval, weight: Tensor, bias: Any = None,
               *args: Any, **settings: Any) -> Interval:
    return Interval(convolve(x.center, weight, bias, *args, **settings),
                    convolve(x.radius, weight.abs(), None, *args, **settings))


def _conv_module(m: Any, x: Interval) -> Interval:
    # _conv_forward also pads by repeating pixels, where the layer does
    return Interval(m._conv_forward(x.center, m.weight, m.bias),
                    m._conv_forward(x.radius, m.weight.abs(), None))


def _normalised(m: _BatchNorm, x: Interval) -> Interval:
    """Normalise by running statistics, or in training mode by those of the centers."""
    rest = [d for d in range(x.center.dim()) if d != 1]
    if m.training or m.running_mean is None or m.running_var is None:
        variance, mean = torch.var_mean(x.center, rest, correction=0)
        _count_in(m, mean.detach(), variance.detach(), x.center.numel() // len(mean))
    else:
        mean, variance = m.running_mean, m.running_var
    scale = (variance + m.eps).rsqrt()
    if m.weight is not None:
        scale = scale * m.weight
    shift = -mean * scale if m.bias is None else m.bias - mean * scale
    shape = [1, -1] + [1] * (x.center.dim() - 2)
    return Interval(torch.addcmul(shift.view(shape), x.center, scale.view(shape)),
                    x.radius * scale.abs().view(shape))


@torch.no_grad()
def _count_in(m: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as torch's own forward does."""
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


_RISING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus)


def _activated(f: nn.Module, x: Interval) -> Interval:
    """Return the interval of an activation that is monotone between the places where it turns."""
    places = turning(f)
    if places is None:
        raise ConversionError(f"{f} has no rule")
    # f may write over what it is given
    left, right = f(x.lower), f(x.upper)
    if isinstance(f, _RISING):
        return between(left, right)
    lower, upper = x.lower, x.upper
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    for place, value in places:
        inside = (lower < place) & (place < upper)
        low = torch.where(inside, low.clamp(max=value), low)
        high = torch.where(inside, high.clamp(min=value), high)
    return between(low, high)


def _activation(kind: str) -> Callable[..., Interval]:
    def rule(_call: Any, x: Interval, *args: Any, **settings: Any) -> Interval:
        module = module_of(kind, (x, *args), settings, (Interval, Tensor))
        if module is None:
            raise ConversionError("its settings are not known beforehand")
        return _activated(module.eval(), x)
    return rule


def _prelu(x: Interval, slope: Tensor) -> Interval:
    left, right = F.prelu(x.lower, slope), F.prelu(x.upper, slope)
    inside = (x.lower < 0) & (x.upper > 0)
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    return between(torch.where(inside, low.clamp(max=0), low),
                   torch.where(inside, high.clamp(min=0), high))


def _quantized(m: QuantActivation, x: Interval, value: Interval | None = None) -> Interval:
    z = x
    if m.bypassed or not m.absorbs:
        z = value if value is not None else \
            x if type(m.function) is nn.Identity else _activated(m.function, x)
    return z if m.bypassed else between(m.quantized(z.lower), m.quantized(z.upper))


def _sum(_call: Any, x: Any, y: Any, alpha: Any = 1) -> Interval:
    center = part("center", x) + alpha * part("center", y)
    radius: Any = 0.0
    if isinstance(x, Interval):
        radius = radius + x.radius
    if isinstance(y, Interval):
        radius = radius + abs(alpha) * y.radius
    return Interval(center, radius.expand(center.shape))


def _difference(call: Any, x: Any, y: Any, alpha: Any = 1) -> Interval:
    return _sum(call, x, y, -alpha)


def _negated(_call: Any, x: Interval) -> Interval:
    return Interval(-x.center, x.radius)


def _product(_call: Any, x: Any, y: Any) -> Interval:
    if not isinstance(x, Interval):
        x, y = y, x
    if not isinstance(y, Interval):
        return Interval(x.center * y, x.radius * abs(y))
    products = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    return between(products.amin(0), products.amax(0))


def _quotient(_call: Any, x: Any, y: Any) -> Interval:
    if isinstance(y, Interval):
        raise ConversionError("a division by what is no constant")
    return Interval(x.center / y, x.radius / abs(y))


# type of a layer -> rule
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    QuantActivation: _quantized,
    nn.Linear: lambda m, x: _linear(m, x, m.weight, m.bias),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv_module),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalised),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
                    rising),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
                     nn.Flatten, nn.Unflatten, nn.ZeroPad2d), alike),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
                     nn.AlphaDropout, nn.FeatureAlphaDropout), _as_it_is),
    nn.PReLU: lambda m, x: _prelu(x, m.weight),
    **dict.fromkeys([cls for cls in MODULE_KINDS if cls not in (nn.GLU, nn.Softmax)], _activated),
}

# function -> rule
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _sum),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _difference),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _product),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _quotient),
    **dict.fromkeys((operator.neg, torch.neg), _negated),
    F.linear: _linear, F.conv1d: _convolved, F.conv2d: _convolved, F.conv3d: _convolved,
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d,
                     F.adaptive_max_pool1d, F.adaptive_max_pool2d, torch.amax, torch.amin,
                     torch.clamp), rising),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
                     torch.mean, torch.sum, torch.flatten, torch.reshape, torch.permute,
                     torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat, torch.concat,
                     torch.split, torch.chunk), alike),
    operator.getitem: lambda call, x, i: alike(call, x, i) if isinstance(x, Interval) else x[i],
    F.pad: _zero_padded, F.dropout: _as_it_is, F.dropout2d: _as_it_is,
    F.prelu: lambda _, x, weight: _prelu(x, weight),
    torch.prelu: lambda _, x, weight: _prelu(x, weight),
    **{f: _activation(kind) for f, kind in FUNCTION_KINDS.items()
       if kind not in ("glu", "softmax", "attention", "prelu", "rrelu")},
}

# name of a method of Tensor -> rule
METHODS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "add_"), _sum), **dict.fromkeys(("sub", "sub_"), _difference),
    **dict.fromkeys(("mul", "mul_"), _product), **dict.fromkeys(("div", "div_"), _quotient),
    "neg": _negated, "prelu": lambda _, x, weight: _prelu(x, weight),
    **dict.fromkeys(("amax", "amin", "clamp", "clamp_"), rising),
    **dict.fromkeys(("mean", "sum", "flatten", "view", "reshape", "permute", "transpose",
                     "squeeze", "unsqueeze", "split", "chunk"), alike),
    **dict.fromkeys(("contiguous", "detach", "clone", "float", "to"), _as_it_is),
    **{name: _activation(kind) for name, kind in METHOD_KINDS.items()
       if kind not in ("softmax", "prelu")},
}
