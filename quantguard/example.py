"""An input that a model accepts, where nobody has given one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .running import (
    accepts,
    changed,
    device_of,
    duplicate,
    on_meta,
    to_device,
)

_SIDES = (224, 299, 32, 28, 64, 96, 8)
_FIRST = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)


def find_example(model: nn.Module,
                 runs: Callable[[nn.Module, Any], bool] = accepts) -> Any:
    """Return an input of one or two images that model accepts in eval mode, or None.

    Tried: what the architecture says of itself, then the channels of its first convolution at
    usual sizes, the features of its first linear or recurrent layer, or token numbers. A forward
    that wants several inputs gets the same for each. Shapes are tried on the meta device, which
    costs next to nothing; on the real one only where the forward does not run there.

    Args:
        runs: says whether a copy of model, which it may change, runs on the real device.

    Returns:
        A tensor, or a dict of tensors by argument name; the same every time.
    """
    names, device = _required(model), device_of(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    kind = torch.float32 if parameter is None else parameter.dtype

    def ready(one: Tensor) -> Any:
        one = one.to(kind) if one.is_floating_point() else one
        return one if len(names) < 2 else dict.fromkeys(names, one)

    examples = [ready(one) for one in _inputs(model, torch.Generator().manual_seed(0))]
    shadow = on_meta(model)
    for example in examples:
        if accepts(shadow, to_device(example, torch.device("meta"))):
            return to_device(example, device)
    if device.type == "meta" or not examples:
        return None
    # These are the models that take seconds: one image will do.
    examples = [changed(example, lambda x: x[:1].to(device)) for example in examples]
    if isinstance(examples[0], Tensor) and examples[0].dim() == 4:
        # Detectors enlarge an image until its short side is 800 pixels or its long one is 1,333:
        # of a strip they make a tenth of what they make of a square.
        strip = torch.randn(1, examples[0].shape[1], 64, 1344,
                            generator=torch.Generator().manual_seed(0))
        examples.insert(0, strip.to(device, kind))
    real = duplicate(model)
    return next((example for example in examples if runs(real, example)), None)


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _inputs(model: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield inputs worth trying."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if isinstance(said, dict) and said.get("input_size"):
        yield normal(2, *said["input_size"])
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    if isinstance(first, nn.Conv2d):
        for side in _SIDES:
            yield normal(2, first.in_channels, side, side)
    elif isinstance(first, nn.Conv1d):
        for length in (1024, 128, 16000):
            yield normal(2, first.in_channels, length)
    elif isinstance(first, nn.Conv3d):
        for side in (112, 224, 64):
            yield normal(2, first.in_channels, 16, side, side)
    elif isinstance(first, nn.Linear):
        yield normal(2, first.in_features)
        yield normal(2, 16, first.in_features)
    elif isinstance(first, nn.RNNBase):
        yield normal(2, 16, first.input_size)
    elif isinstance(first, nn.Embedding):
        yield torch.randint(first.num_embeddings, (2, 16), generator=generator)
