"""A staircase on the input: what a model eats is quantized before its own forward sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .activation import QuantActivation
from .spec import InputSpec, QuantSpec

# Up to so many bits its twin is softened; above it is within half a small step of the staircase.
_FEW_BITS = 4
# The child of the user's model that holds it.
NAME = "input_staircase"


class InputStaircase(nn.Module):
    """Compute ``low + q(x)``: 2^bits levels from low to high, thresholds half-way between them.

    Args:
        spec: bits and range, for all channels or for each.

    Attributes:
        staircase: q, whose lowest level is 0.
        low: (1,), or (C, 1, 1) for each channel.
        dims: of the images that came last; their channels are axis 1.
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
        """Return x quantized, in x's shape; itself under ``bypass``, and while calibrating.

        Softened, it hands every gradient on as it is: beyond either end it has none of its own, and
        who climbs would leave a pixel there that could come back into the range. Its value then is
        the twin's; of many levels its own, which is next to it, and known without a sum of as many
        sigmoids.
        """
        inner = self.staircase
        if inner.in_float:
            return x
        low = self._low(x)
        if not inner.softened:
            return inner(x) + low  # type: ignore[no-any-return]
        with torch.no_grad():
            y = inner(x) if inner.spec.bits <= _FEW_BITS else \
                inner.levels(x) * inner.step.reshape(low.shape).to(low.dtype)
        return y + low + (x - x.detach())

    def _low(self, x: Tensor) -> Tensor:
        """Return the lowest level as it goes with x: (N, C), (N, C, L), (N, C, H, W) or more."""
        if isinstance(x, Tensor) and x.dim() != self.dims:  # a Proxy does not know
            self.dims = x.dim()
        low = self.low if self.dims == 4 or self.low.dim() == 1 else \
            self.low.reshape(-1, *[1] * (self.dims - 2))
        return low.to(x.dtype) if isinstance(x, Tensor) and x.dtype != low.dtype else low


def is_input(name: str) -> bool:
    """Return whether a staircase of that name is the one on the input."""
    return name.split(".")[0] == NAME


def through_entrance(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward whose first floating-point input goes through the input's staircase."""
    def entered(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entrance = self._modules[NAME]
        assert entrance is not None
        for number, value in enumerate(args):
            if _image(value):
                return forward(self, *args[:number], entrance(value), *args[number + 1:], **kwargs)
        for name, value in kwargs.items():
            if _image(value):
                return forward(self, *args, **{**kwargs, name: entrance(value)})
        return forward(self, *args, **kwargs)
    return entered


def _image(value: Any) -> bool:
    return isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.is_floating_point())
