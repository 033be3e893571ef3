"""Batches of a loader: unpacked, checked, mapped to pixels and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.nested_tensors import as_given
from ..core.specs import Threat

RANGE_TOLERANCE = 1e-4  # relative to the range: how far pixels may lie outside
SNAP_TOLERANCE = 1e-6


def unpack(batch: Any) -> tuple[Tensor | dict[str, Any], Tensor | None]:
    """Split a batch into the model's input and the labels.

    Args:
        batch: a tensor; (images,) or (images, labels) as tuple or list; or a dict with the
            model's keyword names and ``labels`` or ``label``.

    Returns:
        Plain tensors, detached from any autograd graph and usable outside of
        torch.inference_mode.

    Raises:
        DataError: anything else, or tensors on the meta device.
    """
    kind = type(batch).__name__
    fix = "A loader yields a tensor, (images, labels), or a dict with the model's names and labels."
    labels: Any = None
    if isinstance(batch, Mapping):
        inputs: Any = dict(batch)
        names = [name for name in ("labels", "label") if name in inputs]
        if len(names) > 1:
            raise DataError("a batch has both 'labels' and 'label'", fix="Leave one out.")
        labels = inputs.pop(names[0]) if names else None
        if not inputs:
            raise DataError("a batch is a dict without model inputs", fix=fix)
    elif isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            kinds = ", ".join(type(item).__name__ for item in batch)
            raise DataError(f"a batch is a {kind} of {len(batch)}: ({kinds})", fix=fix)
        inputs, labels = (batch[0], batch[1]) if len(batch) == 2 else (batch[0], None)
    else:
        inputs = batch
    if not isinstance(inputs, (Tensor, dict)):
        raise DataError(f"a batch's model input is a {type(inputs).__name__}, not a tensor",
                        fix=fix)
    if labels is not None and not isinstance(labels, Tensor):
        raise DataError(f"a batch's labels are a {type(labels).__name__}, not a tensor",
                        fix="Give an integer tensor of shape (N,).")
    return as_given(inputs, "a batch's images are"), as_given(labels, "a batch's labels are")


def require_reiterable(loader: object, where: str) -> None:
    """Raise DataError unless ``loader`` can be iterated more than once.

    No iterator is made: that of a DataLoader would draw random numbers.
    """
    if isinstance(loader, Iterator):
        raise DataError(f"{where} is a one-shot iterator ({type(loader).__name__})",
                        why="It is read more than once.",
                        fix="Give a DataLoader or a list of batches.")
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise DataError(f"{where} is a {type(loader).__name__}, not a loader",
                        fix="Give a DataLoader or a list of batches, such as [(images, labels)].")


def check_images(x: Tensor, bounds: tuple[float, float], where: str) -> None:
    """Raise DataError unless ``x`` holds finite pixels within ``bounds``.

    The tolerance is 1e-4 of the range: undoing a normalisation rounds.
    """
    low, high = bounds
    if not x.is_floating_point():
        raise DataError(f"{where}: images are {x.dtype}, not floating-point",
                        fix="Convert them: images.float() / 255.")
    if x.numel() == 0:
        raise DataError(f"{where}: an empty batch of shape {tuple(x.shape)}")
    smallest, largest = (float(value) for value in x.detach().aminmax())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        bad = int((~x.detach().isfinite()).sum())
        raise DataError(f"{where}: {bad} of {x.numel()} pixels are NaN or infinite")
    slack = RANGE_TOLERANCE * (high - low)
    if smallest >= low - slack and largest <= high + slack:
        return
    fix = "Bring them into bounds, or give the right bounds=."
    if smallest >= low - slack and high <= 1 and 2 < largest <= 255:
        fix = "They look like 0..255: divide them by 255, or use bounds=(0, 255)."
    elif smallest < low - slack or largest <= 2:
        fix = "They look normalised: give the mean= and std= that made them so."
    raise DataError(f"{where}: pixels are {smallest:g}..{largest:g}, outside {low:g}..{high:g}",
                    fix=fix)


def check_labels(y: Tensor, classes: int | None, where: str) -> None:
    """Raise DataError unless ``y`` is (N,) integers, 0 or more and below ``classes``."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.ndim != 1:
        fix = "for one-hot labels, labels.argmax(1)"
        if y.ndim <= 1 or y.shape[1:].numel() == 1:
            fix = "labels.flatten().long()"
        raise DataError(f"{where}: labels are {y.dtype} of shape {tuple(y.shape)}",
                        fix=f"Give one integer per image, shape (N,): {fix}.")
    if y.numel() == 0:
        return
    smallest, largest = int(y.min()), int(y.max())
    if smallest < 0 or (classes is not None and largest >= classes):
        limit = "0 or more" if classes is None else (
            f"0..{classes - 1}: the model has {classes} outputs" if classes > 1 else
            "0: the model has 1 output, and two classes need two")
        raise DataError(f"{where}: labels are {smallest}..{largest}, and must be {limit}")


def to_pixels(x: Tensor, threat: Threat) -> Tensor:
    """Return model inputs as pixels: ``x * std + mean`` per channel."""
    mean, std = _channels(x, threat.mean, "mean"), _channels(x, threat.std, "std")
    x = x if std is None else x * std
    return x if mean is None else x + mean


def from_pixels(p: Tensor, threat: Threat) -> Tensor:
    """Return pixels as model inputs: ``(p - mean) / std`` per channel."""
    mean, std = _channels(p, threat.mean, "mean"), _channels(p, threat.std, "std")
    p = p if mean is None else p - mean
    return p if std is None else p / std


def snap(p: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return pixels with those near one of the 256 levels (1e-6 of the range) set to the level.

    A normalised loader and a raw one then give the same bits. The levels are computed on the CPU,
    as ``uint8.float().div(255)`` is there: CUDA divides by multiplying with a reciprocal.
    """
    low, high = bounds
    levels = (low + torch.arange(256, dtype=torch.float32) * (high - low) / 255).to(p)
    index = ((p.detach() - low) * (255 / (high - low))).round().clamp(0, 255).nan_to_num(0)
    nearest = levels[index.long()]
    return torch.where((p - nearest).abs() <= SNAP_TOLERANCE * (high - low), nearest, p)


def _channels(x: Tensor, values: Sequence[float] | None, name: str) -> Tensor | None:
    """Return per-channel numbers in a shape for (N, C, H, W), or for the last axis of (N, F)."""
    if values is None:
        return None
    axis = 1 if x.ndim >= 3 else -1
    if len(values) not in (1, x.shape[axis]):
        raise DataError(f"{name} has {len(values)} numbers and the images, of shape "
                        f"{tuple(x.shape)}, have {x.shape[axis]} channels",
                        fix=f"Give 1 or {x.shape[axis]}.")
    numbers = torch.tensor(values, dtype=x.dtype, device=x.device)
    return numbers if axis == -1 else numbers.view(-1, *[1] * (x.ndim - 2))
