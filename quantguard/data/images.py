"""Images that an evaluation attacks: pixels and labels from a loader, checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import DataError, SpecError
from ..core.metadata import check_shape, class_names_of
from ..core.nested_tensors import device_of, to_device
from ..core.specs import Threat
from .batches import check_images, check_labels, require_reiterable, snap, to_pixels, unpack


@dataclass(frozen=True)
class Images:
    """Images to attack, with their labels.

    Attributes:
        pixels: (N, ...).
        labels: (N,).
        key: the model's keyword for images; None: its first argument.
        snapped: the largest change of a pixel that was set to one of 256 levels or into the bounds.
        more: whether the loader has further images.
        classes: class names, if the loader's data set has them.
        sample: which images of a data set they are, see :class:`quantguard.data.loader.Sample`.
    """

    pixels: Tensor
    labels: Tensor
    key: str | None = None
    snapped: float = 0.0
    more: bool = False
    classes: tuple[str, ...] | None = None
    sample: dict[str, Any] | None = None


def gather(model: nn.Module, loader: Iterable[Any], threat: Threat, images: int | None) -> Images:
    """Return the first images of a loader as pixels, checked.

    Raises:
        DataError: no labels, no images, pixels outside the bounds, negative labels, or batches
            whose images differ in shape or name.
        SpecError: ``images`` is not a positive integer.
    """
    require_reiterable(loader, "the loader")
    check_count(images)
    device = device_of(model)
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    key: str | None = None
    taken, snapped, more = 0, 0.0, False
    for number, batch in enumerate(loader):
        where = f"batch {number} of the loader"
        inputs, target = unpack(batch)
        if target is None:
            raise DataError(f"{where} has no labels", fix="Yield (images, labels).")
        name, x = image_tensor(inputs, where)
        check_labels(target, None, where)
        if len(x) != len(target):
            raise DataError(f"{where} has {len(x)} images and {len(target)} labels")
        check_images_shape(x, where)
        check_shape(model, x.shape[1:], where)
        if number:
            _check_alike(pixels[0], x, key, name, where)
        key = name
        p = to_pixels(x.float(), threat)
        check_images(p, threat.bounds, where)
        whole = snap(p, threat.bounds).clamp(*threat.bounds)
        snapped = max(snapped, float((whole.double() - p.double()).abs().amax()))
        pixels.append(whole)
        labels.append(target)
        taken += len(x)
        if images is not None and taken >= images:
            more = taken > images or number + 1 < _batches(loader, number + 2)
            break
    if not taken:
        raise DataError("the loader is empty", fix="Give at least one batch.")
    x, y = torch.cat(pixels)[:images], torch.cat(labels)[:images].long()
    sample = getattr(getattr(loader, "dataset", None), "sample", None)
    return Images(to_device(x, device), to_device(y, device), key, snapped, more,
                  class_names_of(loader), sample if isinstance(sample, dict) else None)


def _batches(loader: Iterable[Any], unknown: int) -> int:
    """Return the number of a loader's batches, or ``unknown`` if it has no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return unknown


def warn_if_sorted(data: Images, classes: int) -> None:
    """Warn if the first images of a loader are sorted by class and some classes are missing.

    Confidence intervals assume a random sample of images, and the first images of a sorted folder
    are none. The warning is given if random labels would be so with a probability below 1 %.

    Args:
        data: the images.
        classes: the number of the model's classes.
    """
    labels, n = data.labels, len(data.labels)
    seen = sorted(set(labels.tolist()))
    if not data.more or len(seen) >= classes or bool((labels[1:] < labels[:-1]).any()):
        return
    one = len(seen) == 1 and (n - 1) * math.log(classes) > math.log(100)
    ways = math.lgamma(n + classes) - math.lgamma(n + 1) - math.lgamma(classes)
    if one or ways - n * math.log(classes) < -math.log(100):
        which = f"class {seen[0]}" if len(seen) == 1 else \
            f"{len(seen)} of the model's {classes} classes, sorted"
        warnings.warn(
            f"the first {n} images of the loader are of {which}: their figures do not hold for "
            "the others. Shuffle the data once with a seed, since images= takes the first ones "
            "(torch.utils.data.Subset(data, torch.randperm(len(data), generator=…)))",
            stacklevel=4)


def check_count(images: int | None) -> None:
    """Check a number of images.

    Raises:
        SpecError: it is not an integer, or below 1.
    """
    if images is not None and not (isinstance(images, Integral) and images >= 1):
        raise SpecError(f"images={images!r} must be a whole number, at least 1")


def _check_alike(first: Tensor, x: Tensor, key: str | None, name: str | None, where: str) -> None:
    """Check that a batch agrees with the first one.

    Raises:
        DataError: images of another shape, or under another name.
    """
    if x.shape[1:] != first.shape[1:]:
        raise DataError(f"{where} has images of shape {tuple(x.shape[1:])}, and batch 0 "
                        f"{tuple(first.shape[1:])}",
                        fix="Resize or crop them to one shape.")
    if name != key:
        own, other = ("by no name" if v is None else f"as {v!r}" for v in (name, key))
        raise DataError(f"{where} has images {own}, and batch 0 {other}",
                        fix="Yield all batches in the same form.")


def image_tensor(inputs: Any, where: str) -> tuple[str | None, Tensor]:
    """Return the keyword of the images in a batch, if any, and the images.

    Raises:
        DataError: several inputs, or no tensor.
    """
    if isinstance(inputs, Tensor):
        return None, inputs
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if len(tensors) != 1 or len(inputs) != 1:
        raise DataError(f"{where} holds {', '.join(map(repr, inputs))} beside the labels",
                        why="The images that an attack may change must be the model's only input.",
                        fix="Yield one image tensor, and bind other inputs into the model.")
    ((name, x),) = tensors.items()
    return name, x


def check_images_shape(x: Tensor, where: str) -> None:
    """Check that x is a batch of images or features.

    Raises:
        DataError: an empty batch, or fewer than two dimensions.
    """
    if x.dim() < 2 or not len(x):
        raise DataError(f"{where} has shape {tuple(x.shape)}", fix="Give images as (N, C, H, W).")


def batch_size(x: Tensor, images: int | None = None) -> int:
    """Return the batch size for images of this shape; the last batch is padded to it.

    Args:
        x: images.
        images: the number of all images; None: that of x.
    """
    small = x[0].numel() <= 3 * 64 * 64
    most = (64 if small else 16) if x.device.type == "cpu" else (512 if small else 64)
    # At least 2: a forward that squeezes axes of size 1 fails on a single image.
    return min(most, max(2, len(x) if images is None else images))
