"""Memory order of the weights of convolutions: most kernels are faster with channels last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.module_utils import evaluating
from ..core.runtime import seeded
from .contexts import bypass

# Largest difference of outputs by rounding, relative to the largest output; and in units of the
# precision of the weights' type.
_ROUNDING, _PRECISION = 1e-4, 16


def order_weights(model: nn.Module, layout: torch.memory_format) -> None:
    """Put the weights of 2-d convolutions in a memory order, which their outputs then have."""
    for weight in _weights(model):
        # contiguous() would not change the strides of one channel or of 1x1 kernels.
        weight.data = weight.data.to(memory_format=layout)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Put the weights of 2-d convolutions channels last, inside the context.

    Their data pointers are the old ones afterwards.
    """
    before = [(weight, weight.data) for weight in _weights(model)]
    try:
        order_weights(model, torch.channels_last)
        yield
    finally:
        for weight, data in before:
            weight.data = data


def takes_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Return whether model gives the same outputs with its weights channels last.

    A forward that takes a view across channels fails with them, and one that uses strides computes
    something else. Quantizers are bypassed in the comparison: next to a threshold a rounding error
    becomes a whole level. A compiled model is left alone, since other strides would compile it
    again.

    Args:
        model: the model.
        images: (N, C, H, W).
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
        except Exception:  # a forward may raise anything for this memory order
            return False
    eps = max(torch.finfo(p.dtype).eps for p in _weights(model))
    return bool((before - after).abs().amax()
                <= max(_ROUNDING, _PRECISION * eps) * before.abs().amax())


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile has compiled model or a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
               for m in model.modules())


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the floating-point weights of 2-d convolutions, without repeats.

    Weights that are computed (parametrized) are no parameters and are left out.
    """
    found = (m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Conv2d))
    return list({id(p): p for p in found if p is not None and p.is_floating_point()}.values())
