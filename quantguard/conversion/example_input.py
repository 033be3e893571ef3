"""Find an input that a model accepts, if the user has given none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model_calls import accepts
from ..core.module_utils import duplicate, on_meta
from ..core.nested_tensors import changed, device_of, to_device

_SIDES = (224, 299, 32, 28, 64, 96, 8)
# Attributes in which models store the size and channels of their images.
_IMAGE_SIZE = ("image_size", "img_size")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_LONGEST = 4096  # a longer side is not an image size, or makes too expensive an example
_MAX_SIZES = 4
_FIRST = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)


def find_example(model: nn.Module,
                 runs: Callable[[nn.Module, Any], bool] = accepts) -> Any:
    """Return an input of one or two images that model accepts in eval mode, or None.

    Shapes come from the model's own attributes, then from its first layer: usual image sizes for a
    convolution, the features of a linear or recurrent layer, token numbers for an embedding. A
    forward with several required inputs gets the same for each, except masks. Shapes are tried on
    the meta device, which costs almost nothing, and on the real device only if that fails.

    Args:
        runs: returns whether a copy of model, which it may change, runs on an input.

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
    # Models that do not run on meta tensors can take seconds, so one image must do.
    examples = [changed(example, lambda x: x[:1].to(device)) for example in examples]
    if isinstance(examples[0], Tensor) and examples[0].dim() == 4 and not _named_sizes(model):
        # Detectors enlarge an image until its short side is 800 pixels or its long side is 1,333.
        # An enlarged strip has a tenth of the pixels of an enlarged square.
        strip = torch.randn(1, examples[0].shape[1], 64, 1344,
                            generator=torch.Generator().manual_seed(0))
        examples.insert(0, strip.to(device, kind))
    real = duplicate(model)
    return next((example for example in examples if runs(real, example)), None)


def _names(model: nn.Module) -> list[list[str]]:
    """Return choices of the arguments of forward to fill; [] stands for the first argument."""
    parameters = inspect.signature(model.forward).parameters
    required = [p.name for p in parameters.values() if p.default is p.empty
                and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(required) > 1:
        return [required]
    main = _value(model, "main_input_name")  # set by models of transformers
    if required or main not in parameters:
        return [[]]
    first = [] if next(iter(parameters)) == main else [main]
    beside = [name for name in parameters if name.endswith(("attention_mask", "_shapes"))]
    return [first, [main, *beside]] if beside else [first]


def _argument(name: str, one: Tensor) -> Tensor:
    """Return the value of one argument of a forward with several inputs."""
    if "mask" in name:  # mask nothing
        return torch.ones(one.shape[:2] if one.dim() < 4 else (len(one), *one.shape[2:]),
                          dtype=torch.long)
    if "shapes" in name and one.dim() == 3:  # rows and columns of patches
        side = math.isqrt(one.shape[1])
        return torch.tensor([[side, one.shape[1] // side]] * len(one))
    return one


def _named_sizes(model: nn.Module) -> list[tuple[int, int, int]]:
    """Return the image sizes (channels, height, width) that a model's attributes name.

    These are timm's ``pretrained_cfg``, the ``config`` of Hugging Face's models, and attributes
    such as ``image_size``; first those of the model itself, then those of the modules in it.
    """
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    found: dict[tuple[int, int, int], None] = {}  # in order, each once
    for module in model.modules():
        for name in ("pretrained_cfg", "default_cfg"):
            source = _value(module, name)
            found.update(dict.fromkeys(_sizes(_value(source, "input_size"), 0)))
        config = _value(module, "config")
        for source in (config, _value(config, "vision_config"), module):
            channels = [n for name in _CHANNELS if type(n := _value(source, name)) is int]
            for number in channels[:1] or ((3, 1) if conv is None else (conv.in_channels,)):
                for name in _IMAGE_SIZE:
                    found.update(dict.fromkeys(_sizes(_value(source, name), number)))
        if len(found) >= _MAX_SIZES:
            break
    return list(found)


def _value(source: Any, name: str) -> Any:
    """Return a value of a mapping, a configuration or a module by name, or None."""
    try:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
    except Exception:  # a property may raise any error
        return None


def _sizes(source: Any, channels: int) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) from one side, two sides or all three numbers."""
    numbers = (source, source) if type(source) is int else source
    if isinstance(numbers, Mapping):  # as in image processors
        numbers = numbers.get("height"), numbers.get("width")
    if not isinstance(numbers, (tuple, list)) or not all(
            type(n) is int and 0 < n < _LONGEST for n in numbers):
        return []
    size = tuple(numbers) if len(numbers) == 3 else (channels, *numbers)
    return [size] if len(size) == 3 and size[0] > 0 else []


def _inputs(model: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield inputs to try."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for size in _named_sizes(model):
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
