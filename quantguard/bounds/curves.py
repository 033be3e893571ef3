"""Bounds of activations: each is monotone between a few known places."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import QuantActivation
from ..errors import ConversionError
from ..kinds import MODULE_KINDS
from .boxes import Box, U, narrowed
from .steps import Bent

# What float32 kernels may be off, in units of rounding: vectorised exponentials are good to 20
# units in the last place, AVX-512's error function to 1.5e-7.
_ROUNDINGS = 64 * U


@dataclasses.dataclass(frozen=True)
class Curve:
    """Describe an activation.

    Attributes:
        turns: (place, value) where it turns round or has a corner; monotone in between.
        straight: whether it is straight between them.
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
    # It jumps down to the identity at its threshold; by next to nothing where that is 20.
    jump = float(F.softplus(torch.tensor(-float(f.threshold), dtype=torch.float64))) / f.beta
    return Curve(floor=1 + jump / _ROUNDINGS)


def _gelu(f: nn.GELU) -> Curve:
    return _minimum(f, -0.7517915246935645 if f.approximate == "none" else -0.7524614220710161)


def _minimum(f: nn.Module, place: float) -> Curve:
    """Return a curve that falls up to place and rises from there.

    The place is known to 1e-12: where the function is flat, its value is off by 1e-24.
    """
    return Curve(((place, float(f(torch.tensor(place, dtype=torch.float64)))),))


# kind -> its curve. Kinds without a row have no bounds: they jump, or mix several elements.
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
# Settings below which a row above does not hold.
_POSITIVE = {"celu": "alpha", "softplus": "beta"}


def activated(f: nn.Module, x: Box) -> Box:
    """Return the bounds of f(x) for an activation f without parameters, in eval mode.

    Raises:
        ConversionError: one without a rule.
    """
    kind = MODULE_KINDS.get(type(f), "")
    row = _CURVES.get(kind)
    if row is None or getattr(f, _POSITIVE.get(kind, ""), 1) <= 0:
        raise ConversionError(f"no rule bounds {f}")
    if kind == "rrelu":
        low, high = float(f.lower), float(f.upper)  # type: ignore[arg-type]
        return curved(lambda z: F.rrelu(z, low, high, training=False), row(f), x)
    return curved(f, row(f), x)


def turning(f: nn.Module) -> tuple[tuple[float, float], ...] | None:
    """Return where an activation turns round, (place, value); None: no rule bounds it."""
    kind = MODULE_KINDS.get(type(f), "")
    row = _CURVES.get(kind)
    if row is None or getattr(f, _POSITIVE.get(kind, ""), 1) <= 0:
        return None
    return row(f).turns


def curved(f: Callable[[Tensor], Tensor], curve: Curve, x: Box) -> Box:
    """Return the bounds of f(x), where f is as curve says."""
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
    step = Bent(x, (x.lower, x.upper), (at_left, at_right), curve.turns, error) \
        if curve.straight else None
    return Box(lower - error, upper + error, step)


def prelu(x: Box, weight: Tensor) -> Box:
    """Return the bounds of a PReLU: straight on both sides of 0, whatever its slopes."""
    slope = weight.to(x.lower.dtype)
    size = 1 + float(slope.abs().max())
    curve = dataclasses.replace(_straight((0.0, 0.0)), floor=size)
    return curved(lambda z: F.prelu(z, slope), curve, x)


def quantized(module: QuantActivation, x: Box, value: Box | None = None) -> Box:
    """Return the bounds of a staircase, q(f(x)) or q(value): exactly [q(l), q(u)].

    It is monotone and computes no more than one comparison a threshold and one product, which
    every way of running it rounds alike. Its input is a float32 number, so the ends of its
    interval may move to the float32 numbers between them.

    Raises:
        ConversionError: a staircase inside :func:`quantguard.soften`, or an f without a rule.
    """
    state = module._state
    bypassed = state.action in ("bypass", "observe")
    z = x
    if bypassed or not module.absorbs:
        z = value if value is not None else _float(module, x)
    if bypassed:
        return z
    if state.action != "quantize":
        raise ConversionError("a softened staircase has no certificate",
                              fix="Leave the context quantguard.soften.")
    left, right = z.lower, z.upper
    if left.dtype != torch.float32:
        left, right = narrowed(left, up=True), narrowed(right, up=False)
        crossed = left > right  # rounding noise: no float32 number is between them
        left, right = (torch.where(crossed, z.lower.float(), left),
                       torch.where(crossed, z.upper.float(), right))
    at_left, at_right = (module.quantized(v).to(z.lower.dtype) for v in (left, right))
    lower, upper = torch.minimum(at_left, at_right), torch.maximum(at_left, at_right)
    step = None
    if state.bits is None:
        step = Bent(z, (z.lower, z.upper), (lower, upper), _corners(module, z.lower.dim()))
    return Box(lower, upper, step)


def _float(module: QuantActivation, x: Box) -> Box:
    return x if type(module.function) is nn.Identity else activated(module.function, x)


def _corners(module: QuantActivation, dims: int) -> list[tuple[Tensor, Tensor]]:
    """Return both ends of every jump; the levels are float32 products, as when it runs."""
    t, step, zero = module.thresholds, module.step, module.zero_level
    shape = [1] * dims
    if module.axis is not None:
        shape[module.axis] = -1
    corners = []
    for i, place in enumerate(t.unbind(-1)):
        for level in (i, i + 1):
            value = (level - zero) * step
            corners.append((place.double().reshape(shape), value.double().reshape(shape)))
    return corners
