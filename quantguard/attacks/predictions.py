"""Logits of many images, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConversionError
from ..core.model_calls import run
from .pixel_model import PixelModel


def predict(model: PixelModel, x: Tensor, batch: int, where: str = "",
            attacked: bool = False) -> Tensor:
    """Return the logits of all images.

    Args:
        where: description of the images for error messages.
        attacked: whether the images are adversarial; if so, rows without a class are NaN instead
            of an error.

    Raises:
        DataError: the model does not accept images of this shape.
        ConversionError: logits without a class, see :func:`quantguard.attacks.losses.decided`.
    """
    chunks = []
    for start in range(0, len(x), batch):
        images, size = padded(x[start : start + batch], batch)
        with torch.no_grad():
            logits = run(model, images, where)[:size]
        if torch.isnan(logits).any() and not attacked:
            first = start + int(logits.isnan().any(1).nonzero()[0])
            raise ConversionError("the model returns NaN logits, or infinite ones without a single "
                                  "largest class", why=f"First at image {first}.",
                                  fix="Check its computation there for log of 0, 0 / 0, or an "
                                      "overflow in half precision.")
        chunks.append(logits)
    return torch.cat(chunks)


def padded(x: Tensor, batch: int) -> tuple[Tensor, int]:
    """Return x padded to a full batch, and the number of images that are not padding.

    All batches have one size, since kernels may round differently for other sizes.
    """
    size = len(x)
    return (x if size == batch else torch.cat([x, x[-1:].expand(batch - size, *x.shape[1:])])), size


def batches(pixels: Tensor, labels: Tensor, chosen: np.ndarray,
            batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield batches (images, labels, count) of the chosen rows; rows beyond count are padding.

    A single image is doubled, in case the forward squeezes axes of size 1.
    """
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        x, size = padded(pixels[rows], max(len(rows), 2))
        yield x, padded(labels[rows], len(x))[0], size
