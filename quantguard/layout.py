"""The memory order of convolutions' weights: with channels last most kernels are faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .contexts import bypass
from .running import evaluating, seeded

# How far answers may differ by rounding alone, over the largest; and over a type's own precision.
_ROUNDING, _PRECISION = 1e-4, 16


def order_weights(model: nn.Module, layout: torch.memory_format) -> None:
    """Put the weights of 2-d convolutions in a memory order; what they put out follows it."""
    for weight in _weights(model):
        # contiguous() leaves the strides of one channel and of 1x1 kernels, which are in any order
        weight.data = weight.data.to(memory_format=layout)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Hold the weights of 2-d convolutions channels last; afterwards they lie where they lay."""
    kept = [(weight, weight.data) for weight in _weights(model)]
    try:
        order_weights(model, torch.channels_last)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Return whether model computes the same of images (N, C, H, W) with its weights channels last.

    A forward that asks for a view across channels does not run; one that reads memory as it lies
    computes something else. Staircases are bypassed: next to a threshold rounding is a whole level.
    What torch.compile made would be compiled again for other strides: it stays as it lies.
    """
    if images.dim() != 4 or is_compiled(model) or not _weights(model):
        return False
    images = images.detach()
    with torch.no_grad(), evaluating(model), bypass(model):
        try:
            with seeded(0):
                before = model(images)
            with seeded(0), channels_last(model):
                after = model(images)
        except Exception:  # whatever a forward raises on what it was not made for
            return False
    eps = max(torch.finfo(p.dtype).eps for p in _weights(model))
    return bool((before - after).abs().amax()
                <= max(_ROUNDING, _PRECISION * eps) * before.abs().amax())


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile made anything of model."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
               for m in model.modules())


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the floating-point weights of 2-d convolutions, once each; computed ones have none."""
    found = (m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Conv2d))
    return list({id(p): p for p in found if p is not None and p.is_floating_point()}.values())
