"""An input that a model accepts, where nobody has given one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .running import evaluating, seeded

_SIDES = (224, 299, 32, 28, 64, 96, 8)


def find_example(model: nn.Module) -> Tensor | None:
    """Return an input of two images that model accepts in eval mode, or None.

    Tried: what the architecture says of itself, then the channels of its first convolution at
    usual sizes, or the features of its first linear layer.
    """
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    parameter = next(model.parameters(), None)
    if first is None or parameter is None:
        return None
    shapes: list[tuple[int, ...]] = []
    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if isinstance(said, dict) and said.get("input_size"):
        shapes.append((2, *said["input_size"]))
    if isinstance(first, nn.Conv2d):
        shapes += [(2, first.in_channels, side, side) for side in _SIDES]
    else:
        shapes.append((2, first.in_features))
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        example = torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)
        try:
            with torch.no_grad(), evaluating(model), seeded(0):
                model(example)
        except Exception:
            continue
        return example
    return None
