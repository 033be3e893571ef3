"""Images and labels from an npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ..core.errors import DataError, SpecError
from .batches import RANGE_TOLERANCE, check_labels
from .image_source import ImageSource, Split


def read_npz(file: str | None, split: Split, size: int | None, augment: bool) -> ImageSource:
    """Read x_train and y_train, or x_test and y_test, from an npz file, and check them."""
    if file is None:
        raise SpecError("npz needs a file", fix="Use npz:FILE.")
    import numpy as np

    keys = (f"x_{split}", f"y_{split}")
    if not Path(file).is_file():
        problem = "is not a file" if Path(file).exists() else "does not exist"
        raise DataError(f"{file} {problem}", fix="Use npz:FILE.")
    with open(file, "rb") as content:
        if content.read(4) not in (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUM"):
            raise DataError(f"{file} is not an npz file", why="It is not a zip archive.",
                            fix="Use numpy.savez.")
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(f"{file} is a single array, not an npz", fix="Use numpy.savez.")
        with loaded as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise DataError(f"{file} has no {' and no '.join(missing)}",
                                why=f"It holds {', '.join(archive.files) or 'nothing'}.",
                                fix="Use numpy.savez(FILE, x_train=..., y_train=..., x_test=..., "
                                    "y_test=...).")
            images, labels = archive[keys[0]], archive[keys[1]]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise DataError(f"{file} cannot be read as npz", why=str(error)) from error
        raise DataError(f"{file} holds arrays of Python objects, which are never read",
                        fix="Save arrays of numbers.") from error
    except DataError:
        raise
    except Exception as error:  # numpy: not found, not a zip, damaged, pickled objects
        raise DataError(f"{file} cannot be read as npz",
                        why=f"{type(error).__name__}: {error}") from error
    where = f"{keys[0]} in {file}"
    _check_npz_images(images, where)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{keys[1]} in {file} is {labels.dtype} {labels.shape}",
                        fix="Labels are one integer per image: shape (N,).")
    if len(images) != len(labels):
        raise DataError(f"{file} holds {len(images)} images and {len(labels)} labels ({split})")
    target = torch.from_numpy(labels.astype(np.int64))
    check_labels(target, None, f"{keys[1]} in {file}")
    pixels = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    return ImageSource(TensorDataset(pixels, target), images.shape[1], size)


def _check_npz_images(images: Any, where: str) -> None:
    """Raise DataError unless images are (N, C, H, W), uint8 or floats in [0, 1]."""
    shape = images.shape
    if images.ndim == 3:
        raise DataError(f"{where} has the shape {shape}, without a channel axis",
                        fix="Images are (N, C, H, W): add it with x[:, None].")
    if shape[:1] == (0,):
        raise DataError(f"{where} holds no images")
    if images.ndim != 4 or 0 in shape:
        raise DataError(f"{where} has the shape {shape}", fix="Images are (N, C, H, W).")
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise DataError(f"{where} has the shape {shape}: channels last",
                        fix="Images are (N, C, H, W): x.transpose(0, 3, 1, 2).")
    if images.dtype.name == "uint8":
        return
    if images.dtype.kind != "f":
        raise DataError(f"{where} is {images.dtype}", fix="Use uint8 0..255, or floats in [0, 1].")
    wrong = (images != images).any(axis=(1, 2, 3)).nonzero()[0]
    if len(wrong):
        raise DataError(f"{where} holds NaN in {len(wrong)} images, image {wrong[0]} first")
    low, high = float(images.min()), float(images.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise DataError(f"{where} holds {low:g}..{high:g}, and float images must be in [0, 1]",
                        fix="Store pixels: uint8, or divided by 255; normalise with mean and std.")
