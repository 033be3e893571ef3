"""Batches of a loader as checked pixels and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..attacks import PixelModel
from ..attacks.predictions import predict
from ..core.errors import DataError
from ..core.module_utils import evaluating
from ..core.nested_tensors import device_of
from ..core.specs import Threat
from ..data.batches import check_images, check_labels, to_pixels, unpack
from ..data.images import image_tensor

# Batches that BatchNorm statistics are estimated from.
STATISTICS_BATCHES = 32

_Item = TypeVar("_Item")


class PixelBatches:
    """Turns the batches of a loader into checked pixels and labels for one model.

    Args:
        model: the model that receives the pixels.
        threat: its bounds, mean and std map images to pixels.
        unlabelled: whether images may come without labels, or with the label -1.
    """

    def __init__(self, model: PixelModel, threat: Threat, unlabelled: bool = False) -> None:
        self.model, self.threat, self.unlabelled = model, threat, unlabelled
        self.device = device_of(model)
        self.classes: int | None = None
        self.shapes: set[torch.Size] = set()  # image shapes that the model has accepted

    def __call__(self, batch: Any, number: int,
                 name: str = "the loader") -> tuple[Tensor, Tensor]:
        """Return (pixels, labels) of a batch; its number and the loader's name are for errors.

        Raises:
            DataError: images or labels that the model cannot use.
        """
        where = f"batch {number} of {name}"
        inputs, labels = unpack(batch)
        self.model.key, x = image_tensor(inputs, where)
        if labels is None and self.unlabelled:
            labels = torch.full((len(x),), -1)
        if labels is None:
            raise DataError(f"{where} has no labels", fix="Yield (images, labels).")
        self._check(labels, where)
        if len(x) != len(labels):
            raise DataError(f"{where} has {len(x)} images and {len(labels)} labels")
        pixels = to_pixels(x.to(self.device, self.model.dtype), self.threat)
        check_images(pixels, self.threat.bounds, where)
        # undoing a normalisation rounds
        pixels = pixels.clamp(*self.threat.bounds)
        if pixels.shape[1:] not in self.shapes:
            with evaluating(self.model):
                self.classes = predict(self.model, pixels[:2], 2, where).shape[1]
            self.shapes.add(pixels.shape[1:])
            self._check(labels, where)
        return pixels, labels.to(self.device).long()

    def _check(self, labels: Tensor, where: str) -> None:
        check_labels(labels[labels != -1] if self.unlabelled else labels, self.classes, where)


def of_several(items: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[_Item]:
    """Yield batches of several images; if there are none, the first 32 batches of one image.

    BatchNorm in train mode cannot normalise a single image.
    """
    single: list[_Item] = []
    several = False
    for item in items:
        if size(item) > 1:
            several = True
            yield item
        elif not several:
            single.append(item)
            if len(single) == STATISTICS_BATCHES:
                break
    if not several:
        yield from single
