"""Intervals through a model that is being trained: fast, differentiable, in float32.

The same graph that a certificate goes through (:mod:`quantguard.bounds`), and the same rules in
real numbers: nothing is added for rounding, so this trains and probes; it proves nothing. Interval
bound propagation as in Gowal et al. 2018, arXiv:1810.12715, section 3; through a staircase it is
exact, ``[q(l), q(u)]``, and both ends take the staircase's own surrogate gradient. With ``ramp``
and equal gaps that is one slope from half a gap below the first threshold to half a gap above the
last.
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
from .bounds.flat import Flat, asked, flattened, node_name
from .errors import ConversionError
from .kinds import FUNCTION_KINDS, METHOD_KINDS, MODULE_KINDS, module_of
from .spec import Threat

# Differences of rows of the last layer's weights that are worked out; beyond it the logits' own
# intervals are taken, which are wider.
_PAIRS = 1 << 24


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


def around(pixels: Tensor, eps: float, bounds: tuple[float, float]) -> Interval:
    """Return the Linf ball of radius eps, as far as it lies within bounds."""
    return between((pixels - eps).clamp(min=bounds[0]), (pixels + eps).clamp(max=bounds[1]))


def graph_of(model: nn.Module, threat: Threat, key: str | None, pixels: Tensor) -> Flat:
    """Return the graph of a model as it runs in eval mode, over the model's own parameters.

    Args:
        model: is not touched; what is trained later is seen by the graph, its modes, too.
        threat, key, pixels: as in :func:`quantguard.bounds.flattened`.

    Raises:
        ConversionError: as :func:`quantguard.bounds.flattened`.
    """
    flat = flattened(model, threat, key, pixels)
    flat.root._modules["model"] = model  # instead of the copy; names in the graph are the same
    return flat


def propagate(flat: Flat, x: Interval) -> Interval:
    """Return the intervals of the logits; BatchNorms in training mode see the centers.

    Raises:
        ConversionError: an operation without a rule for how it is called.
    """
    values: dict[fx.Node, Any] = {}
    for node in flat.nodes:
        value = _value(flat, node, values, x)
        if node.op == "output":
            break
        values[node] = value
        for unread in flat.last_use[node]:
            del values[unread]
    if not isinstance(value, Interval) or value.center.dim() != 2:
        raise ConversionError("the model does not return logits (N, classes)")
    return value


def worst_case(logits: Interval, labels: Tensor) -> Tensor:
    """Return the largest that each logit minus the true one can be, (N, C); 0 for the true one.

    The last linear layer is taken together, ``(W_j - W_y) x``, where it is not too large.
    """
    rows = labels.unsqueeze(1)
    center = logits.center - logits.center.gather(1, rows)
    classes = logits.center.shape[1]
    if logits.last is None or classes * logits.last[0].numel() > _PAIRS:
        reach = logits.radius + logits.radius.gather(1, rows)
        return (center + reach).scatter(1, rows, 0.0)
    weight, x = logits.last
    pairs = (weight.unsqueeze(0) - weight.unsqueeze(1)).abs().flatten(0, 1)  # (C * C, features)
    reach = F.linear(x.radius, pairs).view(-1, classes, classes)
    return center + reach[torch.arange(len(labels), device=labels.device), labels]


def _value(flat: Flat, node: fx.Node, values: dict[fx.Node, Any], x: Interval) -> Any:
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    settings: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "placeholder":
        return x
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(flat.root)
    call, rule = _call_and_rule(flat, node)
    if not _any(args, settings) or asked(node):
        return call(*_part("center", args), **_part("center", settings))
    try:
        if rule is None:
            raise ConversionError("it has no rule")
        return rule(call, *args, **settings)
    except (ConversionError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        said = error.what if isinstance(error, ConversionError) else str(error)
        raise ConversionError(f"{node_name(flat.root, node)} has no intervals to train through",
                              why=said.strip().splitlines()[0] if said.strip() else "") from error


def _call_and_rule(flat: Flat, node: fx.Node) -> tuple[Callable[..., Any],
                                                       Callable[..., Any] | None]:
    """Return what a node calls, and the rule that takes this and the node's arguments."""
    if node.op == "call_module":
        module = flat.module(node)
        return module, MODULES.get(type(module))
    if node.op == "call_method":
        name = str(node.target)
        return (lambda x, *args, **settings: getattr(x, name)(*args, **settings)), METHODS.get(name)
    target: Any = node.target
    name = getattr(target, "__name__", "")
    return target, FUNCTIONS.get(target) or (alike if name == "stochastic_depth" else None)


def _any(*values: Any) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(values, lambda v: found.append(v) if isinstance(v, Interval) else None)
    return bool(found)


def _part(name: str, values: Any) -> Any:
    return fx.node.map_aggregate(
        values, lambda v: getattr(v, name) if isinstance(v, Interval) else v)


def _joined(make: Callable[[Tensor, Tensor], Interval], first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return make(first, second)
    return tuple(make(a, b) for a, b in zip(first, second, strict=True))


# Rules take the operation itself, and its arguments with intervals in place of tensors.

def alike(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Send center and radius through the operation: linear, with no weight below 0."""
    return _joined(Interval, call(*_part("center", args), **_part("center", settings)),
                   call(*_part("radius", args), **_part("radius", settings)))


def rising(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Send both ends through the operation, which never falls where an input rises."""
    return _joined(between, call(*_part("lower", args), **_part("lower", settings)),
                   call(*_part("upper", args), **_part("upper", settings)))


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
    center = _part("center", x) + alpha * _part("center", y)
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
    F.prelu: lambda _, x, w: _prelu(x, w), torch.prelu: lambda _, x, w: _prelu(x, w),
    **{f: _activation(kind) for f, kind in FUNCTION_KINDS.items()
       if kind not in ("glu", "softmax", "attention", "prelu", "rrelu")},
}

# name of a method of Tensor -> rule
METHODS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "add_"), _sum), **dict.fromkeys(("sub", "sub_"), _difference),
    **dict.fromkeys(("mul", "mul_"), _product), **dict.fromkeys(("div", "div_"), _quotient),
    "neg": _negated, "prelu": lambda _, x, w: _prelu(x, w),
    **dict.fromkeys(("amax", "amin", "clamp", "clamp_"), rising),
    **dict.fromkeys(("mean", "sum", "flatten", "view", "reshape", "permute", "transpose",
                     "squeeze", "unsqueeze", "split", "chunk"), alike),
    **dict.fromkeys(("contiguous", "detach", "clone", "float", "to"), _as_it_is),
    **{name: _activation(kind) for name, kind in METHOD_KINDS.items()
       if kind not in ("softmax", "prelu")},
}
