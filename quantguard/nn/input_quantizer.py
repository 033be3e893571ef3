"""A quantizer on the input of a model: images are quantized before the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..core.specs import InputSpec, QuantSpec
from .quant_activation import QuantActivation

# Up to so many bits the softened quantizer is computed as such. Above it differs from the quantizer
# by half a small step at most, and the quantizer's own value is used.
_MAX_SOFTENED_BITS = 4
# Name of the child module of the user's model.
NAME = "input_staircase"


class InputQuantizer(nn.Module):
    """``low + q(x)``: 2^bits levels from low to high, with thresholds half-way between them.

    Args:
        spec: bits and range, for all channels or for each.

    Attributes:
        staircase: the quantizer q, whose lowest level is 0.
        low: (1,), or (C, 1, 1) for each channel.
        dims: number of dimensions of the last images; their channels are axis 1.
    """

    low: Tensor
    dims = 4

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        low, high = torch.tensor(spec.low).double(), torch.tensor(spec.high).double()
        m = (1 << spec.bits) - 1
        step = (high - low) / m
        t = low.unsqueeze(1) + step.unsqueeze(1) * (torch.arange(m) + 0.5)
        rows = len(low) > 1
        self.staircase = QuantActivation(QuantSpec(spec.bits, per_channel=rows),
                                         channels=len(low))
        self.staircase.set_thresholds(*((t, step) if rows else (t[0], step[0])), width=step
                                      if rows else step[0])
        self.register_buffer("low", low.float().reshape(-1, 1, 1) if rows else low.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return x quantized, in x's shape; x itself under ``bypass`` and during calibration.

        When softened it is a straight-through estimator. Its true gradient is 0 beyond either end
        of the range, and a gradient attack would leave pixels there that could come back into it.
        The value is that of the softened quantizer, or with many levels the hard one, which is
        close to it and needs no sum over as many sigmoids.
        """
        inner = self.staircase
        if inner.in_float:
            return x
        low = self._low(x)
        if not inner.softened:
            return inner(x) + low  # type: ignore[no-any-return]
        with torch.no_grad():
            y = inner(x) if inner.spec.bits <= _MAX_SOFTENED_BITS else \
                inner.levels(x) * inner.step.reshape(low.shape).to(low.dtype)
        return y + low + (x - x.detach())

    def _low(self, x: Tensor) -> Tensor:
        """Return low in a shape and type for x: (N, C), (N, C, L), (N, C, H, W) or more."""
        if isinstance(x, Tensor) and x.dim() != self.dims:  # a Proxy has no dim()
            self.dims = x.dim()
        low = self.low if self.dims == 4 or self.low.dim() == 1 else \
            self.low.reshape(-1, *[1] * (self.dims - 2))
        return low.to(x.dtype) if isinstance(x, Tensor) and x.dtype != low.dtype else low


def is_input(name: str) -> bool:
    """Return whether this is the name of the quantizer on the input."""
    return name.split(".")[0] == NAME


def through_input_quantizer(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward whose first floating-point argument goes through the input quantizer."""
    def quantized_input(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        quantizer = self._modules[NAME]
        assert quantizer is not None
        for number, value in enumerate(args):
            if _image(value):
                return forward(self, *args[:number], quantizer(value), *args[number + 1:],
                               **kwargs)
        for name, value in kwargs.items():
            if _image(value):
                return forward(self, *args, **{**kwargs, name: quantizer(value)})
        return forward(self, *args, **kwargs)
    return quantized_input


def _image(value: Any) -> bool:
    return isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.is_floating_point())
