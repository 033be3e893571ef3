"""DataLoaders of DATA specs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from ..core.errors import DataError, SpecError
from ..core.specs import plain
from .datasets import DATA_HELP, SOURCES
from .image_source import ImageSource, Split

# Seed of the sample of images that is measured. It does not depend on the seed of the attacks, so
# that every model and every command gets the same images.
SAMPLING_SEED = 0


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Dataset of (image, label): pixels in [0, 1], resized, augmented, normalised, in this order.

    Augmentation uses torch's random numbers; ``torch.manual_seed`` makes it reproducible.
    """

    def __init__(self, source: ImageSource, mean: Tensor | None, std: Tensor | None,
                 augment: bool) -> None:
        self.source, self.mean, self.std, self.augment = source, mean, std, augment
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source.items[index]
        image = image.float().div(255) if image.dtype == torch.uint8 else image
        if self.source.size is not None:
            image = _resize(image, self.source.size)
        if self.augment and self.source.crop:
            image = _pad_and_crop(image)
        if self.augment and self.source.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        if self.mean is not None:
            image = image - self.mean
        if self.std is not None:
            image = image / self.std
        return image, int(label)


def load_data(spec: str, split: Split, *, batch_size: int = 128, size: int | None = None,
              mean: Sequence[float] | float | None = None,
              std: Sequence[float] | float | None = None,
              augment: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load the data that a DATA spec names, as batches of (images (N, C, H, W), labels (N,)).

    Args:
        spec: one of ``DATA_HELP``. Without ROOT, Fashion-MNIST comes from the Debian package
            ``dataset-fashion-mnist``; otherwise it, MNIST and CIFAR-10 are downloaded to and read
            from ``~/.cache/quantguard``. Images of a folder with at most 1 GiB of pixels stay in
            memory after they were read.
        split: ``train`` (shuffled) or ``test`` (in order).
        batch_size: images per batch; the last batch may be smaller.
        size: to which the shorter side is resized before the middle is cropped.
        mean: per channel; images are ``(pixels - mean) / std``, pixels being in [0, 1].
        std: per channel.
        augment: vary the training images by padding of an eighth of the side (at least one pixel)
            and a random crop. CIFAR-10 and image folders are also flipped at random; digits and
            npz images never are, since a flip may change their meaning. Image folders with a
            ``size`` above 64 get a random resized crop (35 % to 100 % of the area) instead.

    Raises:
        SpecError: an unknown spec or an impossible setting.
        DataError: data that is missing, damaged or of the wrong form.

    Example:
        >>> images, labels = next(iter(load_data("digits", "test")))
        >>> images.shape, labels.dtype
        (torch.Size([128, 1, 8, 8]), torch.int64)
    """
    if split not in ("train", "test"):
        raise SpecError(f"split={split!r} is unknown", fix="Use train or test.")
    batch_size, size = plain(batch_size), plain(size)
    for name, value in (("batch_size", batch_size), ("size", 1 if size is None else size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{name}={value!r} must be an integer, 1 or more")
    kind, colon, argument = spec.partition(":")
    if kind in SOURCES and colon and not argument:
        raise SpecError(f"data {spec!r} has nothing after its colon", fix=f"Use {DATA_HELP}.")
    if kind not in SOURCES:
        raise SpecError(f"data {spec!r} is unknown", why=_guess(spec), fix=f"Use {DATA_HELP}.")
    augment = augment and split == "train"
    source = SOURCES[kind](argument or None, split, size, augment)
    dataset: Dataset[Any] = ImageSet(source, _statistic("mean", mean, source.channels),
                                     _statistic("std", std, source.channels), augment)
    return DataLoader(dataset, batch_size=batch_size, shuffle=split == "train")


class Sample(Subset[Any]):
    """Some images of a data set.

    Attributes:
        sample: the size ``of`` the data set, the ``indices`` of the images and the ``seed`` that
            drew them (None: they are the first ones). Results record it.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], seed: int | None) -> None:
        super().__init__(dataset, indices)
        self.sample = {"of": len(dataset), "seed": seed,  # type: ignore[arg-type]
                       "indices": list(indices)}


def to_measure(loader: DataLoader[Any], images: int | None = None, first: bool = False,
               again: dict[str, Any] | None = None) -> DataLoader[Any]:
    """Return a loader of the images to measure: all of a loader in order, or a sample of them.

    The sample is drawn from the whole data set, which may be sorted by class. It is the first
    ``images`` of one permutation, so that a smaller sample is a part of a larger one.

    Args:
        loader: all images.
        images: the number of images; None, or not less than there are: all.
        first: take the first images instead of a sample.
        again: the sample of an earlier result, to take its images.

    Raises:
        DataError: ``again`` is of another data set.
    """
    data: Any = loader.dataset
    n, seed = len(data), None if first else SAMPLING_SEED
    if again is not None:
        indices, seed = list(again.get("indices", ())), again.get("seed")
        if again.get("of") != n or not all(index in range(n) for index in indices):
            raise DataError(f"the earlier result is of a data set of {again.get('of')} images, "
                            f"and this one has {n}", fix="Give the same data and split.")
    elif images is None or images >= n:
        return DataLoader(data, batch_size=loader.batch_size)
    elif first:
        indices = list(range(images))
    else:
        generator = torch.Generator().manual_seed(SAMPLING_SEED)
        indices = torch.randperm(n, generator=generator)[:images].tolist()
    return DataLoader(Sample(data, indices, seed), batch_size=loader.batch_size)


def _guess(spec: str) -> str:
    """Return a guess at what an unknown spec means, as a sentence, or an empty string."""
    if os.path.isdir(spec):
        return f"It is a folder: imagefolder:{spec}?"
    if os.path.exists(spec):
        return f"It is a file: npz:{spec}?"
    if any(mark in spec for mark in "/\\") or spec.endswith(".npz"):
        return f"It looks like a path, and does not exist: {spec}"
    near = difflib.get_close_matches(spec.partition(":")[0], SOURCES, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _resize(image: Tensor, size: int) -> Tensor:
    """Return (C, H, W) with the shorter side resized to ``size`` and the middle cropped."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[..., top:top + size, left:left + size]


def _pad_and_crop(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    pad = max(1, min(height, width) // 8)
    top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
    return F.pad(image, (pad,) * 4)[..., top:top + height, left:left + width]


def _statistic(name: str, value: Sequence[float] | float | None, channels: int) -> Tensor | None:
    """Return a checked mean or std as (C or 1, 1, 1)."""
    if value is None:
        return None
    try:
        numbers = torch.as_tensor(plain(value), dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}={value!r} is not a list of numbers", why=str(error)) from error
    if len(numbers) not in (1, channels):
        raise DataError(f"{name} has {len(numbers)} numbers and the images have {channels} "
                        "channels", fix=f"Give 1 or {channels}.")
    if not numbers.isfinite().all() or (name == "std" and numbers.min() <= 0):
        positive = " and positive" if name == "std" else ""
        raise DataError(f"{name}={value!r} must be finite{positive}")
    return numbers.view(-1, 1, 1)
