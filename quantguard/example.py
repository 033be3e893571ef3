"""An input that a model accepts, where nobody has given one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
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
# How models say for which images they were made.
_IMAGE_SIZE = ("image_size", "img_size")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_LONGEST = 4096  # a longer side is something else, or more than an example should cost
_MOST_SAID = 4
_FIRST = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)


def find_example(model: nn.Module,
                 runs: Callable[[nn.Module, Any], bool] = accepts) -> Any:
    """Return an input of one or two images that model accepts in eval mode, or None.

    Tried: what the architecture says of itself, then the channels of its first convolution at
    usual sizes, the features of its first linear or recurrent layer, or token numbers. A forward
    that wants several inputs gets the same for each, but for masks. Shapes are tried on the meta
    device, which costs next to nothing; on the real one only where the forward does not run there.

    Args:
        runs: says whether a copy of model, which it may change, runs on an input of its device.

    Returns:
        A tensor, or a dict of tensors by argument name; the same every time.
    """
    device = device_of(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    kind = torch.float32 if parameter is None else parameter.dtype

    def ready(one: Tensor, names: list[str]) -> Any:
        one = one.to(kind) if one.is_floating_point() else one
        return {name: _argument(name, one) for name in names} if names else one

    examples = [ready(one, names) for names in _names(model)
                for one in _inputs(model, torch.Generator().manual_seed(0))]
    shadow = on_meta(model)
    for example in examples:
        if runs(shadow, to_device(example, torch.device("meta"))):
            return to_device(example, device)
    if device.type == "meta" or not examples:
        return None
    # These are the models that take seconds: one image will do.
    examples = [changed(example, lambda x: x[:1].to(device)) for example in examples]
    if isinstance(examples[0], Tensor) and examples[0].dim() == 4 and not _said(model):
        # Detectors enlarge an image until its short side is 800 pixels or its long one is 1,333:
        # of a strip they make a tenth of what they make of a square.
        strip = torch.randn(1, examples[0].shape[1], 64, 1344,
                            generator=torch.Generator().manual_seed(0))
        examples.insert(0, strip.to(device, kind))
    real = duplicate(model)
    return next((example for example in examples if runs(real, example)), None)


def _names(model: nn.Module) -> list[list[str]]:
    """Return choices of the arguments of forward that want an input; [] where its first does."""
    parameters = inspect.signature(model.forward).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty
                and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(required) > 1:
        return [required]
    main = _value(model, "main_input_name")  # as models of transformers say it
    if required or main not in parameters:
        return [[]]
    first = [] if next(iter(parameters)) == main else [main]
    beside = [name for name in parameters if name.endswith(("attention_mask", "_shapes"))]
    return [first, [main, *beside]] if beside else [first]


def _argument(name: str, one: Tensor) -> Tensor:
    """Return what a forward that wants several inputs gets under a name, beside the first."""
    if "mask" in name:  # everything counts
        return torch.ones(one.shape[:2] if one.dim() < 4 else (len(one), *one.shape[2:]),
                          dtype=torch.long)
    if "shapes" in name and one.dim() == 3:  # patches in a row, and how they lie in the image
        side = math.isqrt(one.shape[1])
        return torch.tensor([[side, one.shape[1] // side]] * len(one))
    return one


def _said(model: nn.Module) -> list[tuple[int, int, int]]:
    """Return the sizes of images (channels, height, width) that a model says it was made for.

    Read are timm's ``pretrained_cfg``, the ``config`` of Hugging Face's models, and attributes
    such as ``image_size``; those of the model itself first, then those of what it wraps.
    """
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    found: dict[tuple[int, int, int], None] = {}  # in order, each once
    for module in model.modules():
        for name in ("pretrained_cfg", "default_cfg"):
            said = _value(module, name)
            found.update(dict.fromkeys(_sizes(_value(said, "input_size"), 0)))
        config = _value(module, "config")
        for said in (config, _value(config, "vision_config"), module):
            channels = [n for name in _CHANNELS if type(n := _value(said, name)) is int]
            for number in channels[:1] or ((3, 1) if conv is None else (conv.in_channels,)):
                for name in _IMAGE_SIZE:
                    found.update(dict.fromkeys(_sizes(_value(said, name), number)))
        if len(found) >= _MOST_SAID:
            break
    return list(found)


def _value(said: Any, name: str) -> Any:
    """Return what a dict, a configuration or a module says under a name, or None."""
    try:
        return said.get(name) if isinstance(said, Mapping) else getattr(said, name, None)
    except Exception:  # a property of somebody else's may raise anything
        return None


def _sizes(said: Any, channels: int) -> list[tuple[int, int, int]]:
    """Return a size as (channels, height, width): of a side, two sides, or all three."""
    numbers = (said, said) if type(said) is int else said
    if isinstance(numbers, Mapping):  # as an image processor says it
        numbers = numbers.get("height"), numbers.get("width")
    if not isinstance(numbers, (tuple, list)) or not all(
            type(n) is int and 0 < n < _LONGEST for n in numbers):
        return []
    size = tuple(numbers) if len(numbers) == 3 else (channels, *numbers)
    return [size] if len(size) == 3 and size[0] > 0 else []


def _inputs(model: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield inputs worth trying."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for size in _said(model):
        yield normal(2, *size)
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
