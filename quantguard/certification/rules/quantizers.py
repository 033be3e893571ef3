"""Rule of quantized activations: intervals pass them exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import ConversionError
from ...nn.quant_activation import QuantActivation
from .activations import activated, train_activation_layer
from .intervals import Interval, narrowed
from .linear_bounds import PiecewiseLinear
from .registry import register_rule
from .training import TrainInterval, between


def train_quantized(module: QuantActivation, x: TrainInterval,
                    value: TrainInterval | None = None) -> TrainInterval:
    z = x
    if module.bypassed or not module.absorbs:
        z = value if value is not None else x if type(module.function) is nn.Identity \
            else train_activation_layer(module.function, x)
    return z if module.bypassed else between(module.quantized(z.lower), module.quantized(z.upper))


@register_rule(QuantActivation, training=train_quantized)
def quantized(module: QuantActivation, x: Interval, value: Interval | None = None) -> Interval:
    """Return the bounds of a quantizer, q(f(x)) or q(value): exactly [q(l), q(u)].

    It is monotone and computes only comparisons with thresholds and one product, which every kernel
    rounds alike. Its input is a float32 number, so the ends of its interval may move inwards to
    float32 numbers.

    Raises:
        ConversionError: a quantizer inside :func:`quantguard.soften`, or an f without a rule.
    """
    state = module._state
    bypassed = state.action in ("bypass", "observe")
    z = x
    if bypassed or not module.absorbs:
        z = value if value is not None else x if type(module.function) is nn.Identity \
            else activated(module.function, x)
    if bypassed:
        return z
    if state.action != "quantize":
        raise ConversionError("a softened model has no certificate",
                              fix="Leave the context quantguard.soften.")
    left, right = z.lower, z.upper
    if left.dtype != torch.float32:
        left, right = narrowed(left, up=True), narrowed(right, up=False)
        empty = left > right  # rounding noise: no float32 number is between them
        left, right = (torch.where(empty, z.lower.float(), left),
                       torch.where(empty, z.upper.float(), right))
    at_left, at_right = (module.quantized(v).to(z.lower.dtype) for v in (left, right))
    lower, upper = torch.minimum(at_left, at_right), torch.maximum(at_left, at_right)
    step = None
    if state.bits is None:
        corners = _corners(module, z.lower.dim())
        step = PiecewiseLinear(z, (z.lower, z.upper), (lower, upper), corners)
    return Interval(lower, upper, step)


def _corners(module: QuantActivation, dims: int) -> list[tuple[Tensor, Tensor]]:
    """Return both ends of every jump; levels are float32 products, as in the running model."""
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
