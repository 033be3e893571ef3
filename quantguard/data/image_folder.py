"""Images in class folders: DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import DataError, SpecError
from .image_source import ImageSource, Split

# Images of a folder stay in memory after they were read if all pixels are at most so many bytes.
_MAX_CACHED_BYTES = 1 << 30


def read_image_folder(root: str | None, split: Split, size: int | None,
                      augment: bool) -> ImageSource:
    """Return the images of a folder, whose headers are all checked before."""
    if root is None:
        raise SpecError("imagefolder needs a folder", fix="Use imagefolder:DIR.")
    datasets = importlib.import_module("torchvision.datasets")
    transforms = importlib.import_module("torchvision.transforms")
    folder = Path(root, "train" if split == "train" else "val")
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist",
                        fix="An image folder is DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE.")
    _check_classes(Path(root, "train"), Path(root, "val"))
    steps, varied = [transforms.PILToTensor()], augment and size is not None and size > 64
    if varied:
        steps = [transforms.RandomResizedCrop(size, scale=(0.35, 1.0)), *steps]
    elif size is not None:
        steps = [transforms.Resize(size), transforms.CenterCrop(size), *steps]
    try:
        items = datasets.ImageFolder(folder, transforms.Compose(steps), loader=_open_image)
    except OSError as error:  # torchvision: no class, or a class without images
        raise DataError(f"{folder} does not hold images in class folders",
                        why=str(error)) from error
    mode, pixels = _check_folder([path for path, _ in items.samples], folder, size)
    channels = 1 if mode == "L" else 3
    small = len(items) * channels * pixels <= _MAX_CACHED_BYTES
    return ImageSource(_CachedItems(items) if small and not varied else items, channels,
                       crop=not varied, flip=True, classes=tuple(items.classes))


class _CachedItems(Dataset[Any]):
    """Dataset that keeps each item in memory: decoding an image may take as long as a step.

    Args:
        items: a dataset of (image, label) without randomness.
    """

    def __init__(self, items: Any) -> None:
        self.items = items
        self.read: dict[int, tuple[Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self.read:
            self.read[index] = self.items[index]
        return self.read[index]


def _check_classes(train: Path, val: Path) -> None:
    """Raise DataError if both splits exist and their class folders differ."""
    if not (train.is_dir() and val.is_dir()):
        return
    names = [{entry.name for entry in os.scandir(part) if entry.is_dir()} for part in (train, val)]
    extra = ((train, names[0] - names[1]), (val, names[1] - names[0]))
    problems = [f"only in {part}: {', '.join(sorted(only)[:5])}{', ...' if len(only) > 5 else ''}"
                for part, only in extra if only]
    if problems:
        raise DataError(f"{train} and {val} do not hold the same classes", why="; ".join(problems),
                        fix="A class's number is its place in the sorted names, so both need all.")


def _check_folder(paths: list[str], folder: Path, size: int | None) -> tuple[str, int]:
    """Read every header; return the common mode, L or RGB, and the pixels of one loaded image."""
    from PIL import Image

    modes: dict[str, list[str]] = {}
    sizes: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                modes.setdefault(image.mode, []).append(path)
                sizes.setdefault(image.size, path)
        except OSError as error:
            raise DataError(f"{path} is not a readable image", why=str(error)) from error
    rare = sorted(modes, key=lambda mode: len(modes[mode]))
    if len(modes) > 1 or rare[0] not in ("L", "RGB"):
        counts = ", ".join(f"{len(modes[mode])} in mode {mode}" for mode in reversed(rare))
        raise DataError(f"{folder}: {counts}; among them {', '.join(modes[rare[0]][:3])}",
                        why="No image's channels are converted silently.",
                        fix="Save all as RGB, or all as greyscale (L).")
    if size is None and len(sizes) > 1:
        shown = ", ".join(f"{w}x{h} ({path})" for (w, h), path in list(sizes.items())[:3])
        raise DataError(f"{folder}: images of {len(sizes)} sizes: {shown}"
                        + (", ..." if len(sizes) > 3 else ""),
                        fix="Give them one: --size 224 (size=224).")
    return rare[0], math.prod(next(iter(sizes))) if size is None else size * size


def _open_image(path: str) -> Any:
    """Return a PIL image, completely read; raise DataError if it is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise DataError(f"{path} is not a readable image", why=str(error)) from error
