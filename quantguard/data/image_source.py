"""Record of the images that a DATA spec names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import Dataset

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ImageSource:
    """Images of a DATA spec: items (image (C, H, W), label), and how to augment them."""

    items: Dataset[Any]
    channels: int
    size: int | None = None  # to which the images must still be resized
    crop: bool = True  # augmentation pads and crops
    flip: bool = False  # augmentation flips horizontally
    classes: tuple[str, ...] | None = None  # class names in the order of the labels
