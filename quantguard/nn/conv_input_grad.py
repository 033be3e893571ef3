"""A faster gradient of a first convolution with respect to the image, on a CPU.

CPU libraries compute the input gradient of a convolution for sixteen channels at once, even where
the image has one or three. An attack step on a small net spends a quarter of its time there. A
matrix product and a sum of shifted planes take a sixth to nine tenths as long, and differ by
rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MAX_CHANNELS = 4
# Bytes of the products of one call: more do not fit the caches, fewer need many calls.
_PRODUCT_BYTES = 2**24
_TYPES = {torch.float32, torch.bfloat16, torch.float64}


def takes_few_channels(weight: Tensor) -> bool:
    """Return whether a weight (O, I, h, w) is that of a convolution of so few channels."""
    return weight.dim() == 4 and weight.shape[1] <= _MAX_CHANNELS


class _FewChannelConv(torch.autograd.Function):
    """Convolution without groups and with zero padding; its input gradient is ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
                padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        ctx.how = stride, padding, dilation
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        image, *others = ctx.needs_input_grad[:3]
        found: list[Tensor | None] = [None, None, None]
        if any(others):
            stride, padding, dilation = ctx.how
            found[1:] = torch.ops.aten.convolution_backward(
                grads[0], x, weight, [weight.shape[0]] * ctx.bias, stride, padding, dilation, False,
                [0, 0], 1, [False, *others])[1:]
        if image:
            found[0] = _input_gradient(grads[0], weight, x.shape, *ctx.how)
        return *found, None, None, None


def _input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, stride: tuple[int, int],
               padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Return the gradient with respect to images of this shape, from that of the output."""
    images, channels, height, width = shape
    rows, columns = weight.shape[2:]
    high, wide = gradient.shape[2:]
    filters = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0])
    kind = torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype
    # The contribution of each filter position is a plane, shifted by its offset.
    down, right = (s * (n - 1) + 1 for s, n in zip(stride, (high, wide), strict=True))
    total = gradient.new_zeros(
        (channels, images, max(height + 2 * padding[0], down + dilation[0] * (rows - 1)),
         max(width + 2 * padding[1], right + dilation[1] * (columns - 1))), dtype=kind)
    each = max(1, _PRODUCT_BYTES // max(1, len(filters) * high * wide * gradient.element_size()))
    for at in range(0, images, each):
        part, into = gradient[at:at + each], total[:, at:at + each]
        planes = torch.bmm(filters.expand(len(part), -1, -1), part.flatten(2)).view(
            -1, channels, rows, columns, high, wide).movedim(0, 3)
        for i in range(rows):
            for j in range(columns):
                top, left = i * dilation[0], j * dilation[1]
                into[:, :, top:top + down:stride[0], left:left + right:stride[1]] += planes[:, i, j]
    inside = total[:, :, padding[0]:padding[0] + height, padding[1]:padding[1] + width]
    return inside.transpose(0, 1).to(gradient.dtype).contiguous()


class ConvInputGrad(TorchFunctionMode):
    """Context in which convolutions of few input channels have a faster backward.

    It applies on a CPU to those whose input needs a gradient. Outputs do not change, and gradients
    of weights are computed as elsewhere.
    """

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_grad_enabled():
            convolved = _convolved(*args, **kwargs)
            if convolved is not None:
                return convolved
        return func(*args, **kwargs)


def _convolved(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
               padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Tensor | None:
    """Return the convolution, or None where it does not apply; arguments as in torch.conv2d."""
    if type(input) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or groups != 1 \
            or isinstance(padding, str) or not takes_few_channels(weight) or input.dim() != 4 \
            or not input.requires_grad or input.device.type != "cpu":
        return None
    tensors = [input, weight, *([] if bias is None else [bias])]
    if torch.is_autocast_enabled("cpu") and torch.float64 not in {v.dtype for v in tensors}:
        tensors = [v.to(torch.get_autocast_dtype("cpu")) for v in tensors]
    kinds = {v.dtype for v in tensors}
    if len(kinds) != 1 or not kinds <= _TYPES:
        return None
    with torch.autocast("cpu", enabled=False):
        y: Tensor = _FewChannelConv.apply(*tensors[:2], tensors[2] if len(tensors) > 2 else None,
                                          _two(stride), _two(padding), _two(dilation))
    return y


def _two(value: Any) -> tuple[int, int]:
    """Return one number, or two, as two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * 2 if len(values) == 1 else values
