"""Rules of elementwise activations, which are monotone between a few known places.

To add one, list it in ``nn/activation_kinds.py`` and give it a curve here; both domains read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConversionError
from ...nn.activation_kinds import FUNCTION_KINDS, METHOD_KINDS, MODULE_KINDS, module_of
from .arguments import weights
from .intervals import Interval, U
from .linear_bounds import PiecewiseLinear
from .registry import NoRule, register_rule
from .training import TrainInterval, between, nondecreasing

# Error of float32 kernels, in units of rounding: vectorised exponentials are accurate to 20 units
# in the last place, AVX-512's error function to 1.5e-7.
_ROUNDINGS = 64 * U


@dataclasses.dataclass(frozen=True)
class Curve:
    """Shape of an activation.

    Attributes:
        turns: (place, value) of its extrema and corners; it is monotone between them.
        straight: whether it is linear between them.
        exact: whether float32 computes it without rounding.
        floor: rounding is relative to at least this.
        bounded: whether rounding does not grow with the input.
    """

    turns: tuple[tuple[float, float], ...] = ()
    straight: bool = False
    exact: bool = False
    floor: float = 1.0
    bounded: bool = False


def _straight(*turns: tuple[float, float], exact: bool = False) -> Curve:
    return Curve(turns, straight=True, exact=exact)


def _softplus(f: nn.Softplus) -> Curve:
    # It jumps down to the identity at its threshold, by a tiny amount if that is 20.
    jump = float(F.softplus(torch.tensor(-float(f.threshold), dtype=torch.float64))) / f.beta
    return Curve(floor=1 + jump / _ROUNDINGS)


def _gelu(f: nn.GELU) -> Curve:
    return _minimum(f, -0.7517915246935645 if f.approximate == "none" else -0.7524614220710161)


def _minimum(f: nn.Module, place: float) -> Curve:
    """Return a curve that decreases up to place and increases from there.

    The place is known to 1e-12; since the slope is 0 there, the value is off by 1e-24.
    """
    return Curve(((place, float(f(torch.tensor(place, dtype=torch.float64)))),))


# kind -> its curve. Kinds without an entry have no bounds: they jump, or mix several elements.
_CURVES: dict[str, Callable[[Any], Curve]] = {
    "relu": lambda f: _straight((0.0, 0.0), exact=True),
    "relu6": lambda f: _straight((0.0, 0.0), (6.0, 6.0), exact=True),
    "leaky_relu": lambda f: _straight((0.0, 0.0)),
    "rrelu": lambda f: _straight((0.0, 0.0)),
    "hardtanh": lambda f: _straight((f.min_val, f.min_val), (f.max_val, f.max_val)),
    "hardsigmoid": lambda f: _straight((-3.0, 0.0), (3.0, 1.0)),
    "softshrink": lambda f: _straight((-f.lambd, 0.0), (f.lambd, 0.0)),
    "elu": lambda f: Curve(((0.0, 0.0),), floor=1 + abs(f.alpha)),
    "selu": lambda f: Curve(floor=2.0),
    "celu": lambda f: Curve(floor=1 + abs(f.alpha)),
    "gelu": _gelu,
    "silu": lambda f: _minimum(f, -1.2784645427610737),
    "mish": lambda f: _minimum(f, -1.1924312145154952),
    "hardswish": lambda f: _minimum(f, -1.5),
    "softplus": _softplus,
    "softsign": lambda f: Curve(bounded=True),
    "log_sigmoid": lambda f: Curve(),
    "tanhshrink": lambda f: Curve(),
    "tanh": lambda f: Curve(bounded=True),
    "sigmoid": lambda f: Curve(bounded=True),
}
# Settings that must be positive for an entry above to hold.
_POSITIVE = {"celu": "alpha", "softplus": "beta"}
_NONDECREASING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus)


def _curve(f: nn.Module) -> Curve | None:
    """Return the curve of an activation without parameters; None where it has no bounds."""
    kind = MODULE_KINDS.get(type(f), "")
    entry = _CURVES.get(kind)
    if entry is None or getattr(f, _POSITIVE.get(kind, ""), 1) <= 0:
        return None
    return entry(f)


def train_activation_layer(f: nn.Module, x: TrainInterval) -> TrainInterval:
    """Return the interval of an activation that is monotone between its extrema and corners."""
    curve = _curve(f)
    if curve is None:
        raise NoRule(f"{f} has no rule")
    # lower and upper are new tensors each time: f may write into its argument
    left, right = f(x.lower), f(x.upper)
    if isinstance(f, _NONDECREASING):
        return between(left, right)
    lower, upper = x.lower, x.upper
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    for place, value in curve.turns:
        inside = (lower < place) & (place < upper)
        low = torch.where(inside, low.clamp(max=value), low)
        high = torch.where(inside, high.clamp(min=value), high)
    return between(low, high)


# All but the layers that mix several elements. Those without a curve raise a telling error.
@register_rule(*(cls for cls in MODULE_KINDS if cls not in (nn.GLU, nn.Softmax)),
               training=train_activation_layer)
def activated(f: nn.Module, x: Interval) -> Interval:
    """Return the bounds of f(x) for an activation f without parameters, in eval mode.

    Raises:
        ConversionError: one without a rule.
    """
    curve = _curve(f)
    if curve is None:
        raise ConversionError(f"no rule bounds {f}")
    if isinstance(f, nn.RReLU):
        low, high = float(f.lower), float(f.upper)
        return curved(lambda z: F.rrelu(z, low, high, training=False), curve, x)
    return curved(f, curve, x)


def curved(f: Callable[[Tensor], Tensor], curve: Curve, x: Interval) -> Interval:
    """Return the bounds of f(x) for a function f of the given shape."""
    at_left, at_right = f(x.lower.clone()), f(x.upper.clone())
    lower, upper = torch.minimum(at_left, at_right), torch.maximum(at_left, at_right)
    for place, value in curve.turns:
        inside = (x.lower < place) & (place < x.upper)
        lower = torch.where(inside, lower.clamp(max=value), lower)
        upper = torch.where(inside, upper.clamp(min=value), upper)
    error: Any = 0.0
    if not curve.exact:
        size = torch.maximum(lower.abs(), upper.abs()) + curve.floor
        error = _ROUNDINGS * (size if curve.bounded else size + x.size)
        if error.dtype == torch.float32:  # the bound's own kernel, and the sums below
            error = error * 2.5
    step = PiecewiseLinear(x, (x.lower, x.upper), (at_left, at_right), curve.turns, error) \
        if curve.straight else None
    return Interval(lower - error, upper + error, step)


def _activation(kind: str) -> Callable[..., Interval]:
    def rule(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        module = module_of(kind, (x, *args), kwargs, (Interval, Tensor))
        if module is None:
            raise NoRule("settings that depend on the image")
        return activated(module.eval(), x)
    return rule


def _train_activation(kind: str) -> Callable[..., TrainInterval]:
    def rule(_call: Any, x: TrainInterval, *args: Any, **kwargs: Any) -> TrainInterval:
        module = module_of(kind, (x, *args), kwargs, (TrainInterval, Tensor))
        if module is None:
            raise NoRule("its settings depend on the image")
        return train_activation_layer(module.eval(), x)
    return rule


for _target, _kind in (*FUNCTION_KINDS.items(), *METHOD_KINDS.items()):
    if _kind not in ("glu", "softmax", "attention", "prelu", "rrelu"):
        register_rule(_target, training=_train_activation(_kind))(_activation(_kind))


def train_prelu(_call: Any, x: TrainInterval, weight: Tensor) -> TrainInterval:
    left, right = F.prelu(x.lower, weight), F.prelu(x.upper, weight)
    inside = (x.lower < 0) & (x.upper > 0)
    low, high = torch.minimum(left, right), torch.maximum(left, right)
    return between(torch.where(inside, low.clamp(max=0), low),
                   torch.where(inside, high.clamp(min=0), high))


@register_rule(F.prelu, torch.prelu, "prelu", training=train_prelu)
def prelu(x: Interval, weight: Any) -> Interval:
    """Return the bounds of a PReLU: linear on both sides of 0 for all slopes."""
    slope = weights(weight).to(x.lower.dtype)
    size = 1 + float(slope.abs().max())
    curve = dataclasses.replace(_straight((0.0, 0.0)), floor=size)
    return curved(lambda z: F.prelu(z, slope), curve, x)


def train_prelu_layer(m: nn.PReLU, x: TrainInterval) -> TrainInterval:
    return train_prelu(m, x, m.weight)


register_rule(nn.PReLU, training=train_prelu_layer, attributes="weight")(prelu)


@register_rule(torch.clamp, "clamp", "clamp_", training=nondecreasing)
def clamp(x: Interval, min: Any = None, max: Any = None) -> Interval:
    low = -math.inf if min is None else min
    high = math.inf if max is None else max
    if not all(isinstance(v, (int, float)) for v in (low, high)) or low > high:
        raise NoRule("bounds that are not numbers, or in the wrong order")
    if (low, high) == (0, math.inf):
        return activated(nn.ReLU(), x)
    corners = tuple((float(v), float(v)) for v in (low, high) if math.isfinite(v))
    return curved(lambda z: z.clamp(low, high), Curve(corners, straight=True), x)
