"""Data sets that a DATA spec can name.

To add one, write a function (ROOT, split, size, augment) that returns an :class:`ImageSource`, and
enter it in ``SOURCES`` and ``DATA_HELP``. Readers of a file format have files of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from ..core.errors import DataError, SpecError
from .downloads import cache_folder, download
from .idx_files import read_idx_dataset
from .image_folder import read_image_folder
from .image_source import ImageSource, Split
from .npz_files import read_npz

DATA_HELP = ("digits | fashion-mnist[:ROOT] | mnist[:ROOT] | cifar10[:ROOT] | imagefolder:DIR "
             "(DIR/train, DIR/val) | npz:FILE (x_train, y_train, x_test, y_test)")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
            "truck")


def _digits(root: str | None, split: Split, size: int | None, augment: bool) -> ImageSource:
    if root is not None:
        raise SpecError(f"digits:{root}: digits is a part of scikit-learn and takes no ROOT",
                        fix="Use digits.")
    try:
        datasets = importlib.import_module("sklearn.datasets")
        selection = importlib.import_module("sklearn.model_selection")
    except ImportError as error:
        raise DataError("digits is a part of scikit-learn, which cannot be imported",
                        why=f"{type(error).__name__}: {error}",
                        fix="Install it: pip install scikit-learn.") from error
    images, labels = datasets.load_digits(return_X_y=True)
    chosen = selection.train_test_split(images, labels, test_size=500, stratify=labels,
                                        random_state=0)
    images, labels = (chosen[0], chosen[2]) if split == "train" else (chosen[1], chosen[3])
    pixels = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    return ImageSource(TensorDataset(pixels, torch.from_numpy(labels)), 1, size, classes=_DIGITS)


def _fashion_mnist(root: str | None, split: Split, size: int | None, augment: bool) -> ImageSource:
    return read_idx_dataset("FashionMNIST", root, split, size, [DEBIAN_FASHION_MNIST], _FASHION)


def _mnist(root: str | None, split: Split, size: int | None, augment: bool) -> ImageSource:
    return read_idx_dataset("MNIST", root, split, size, [], _DIGITS)


def _cifar10(root: str | None, split: Split, size: int | None, augment: bool) -> ImageSource:
    datasets = importlib.import_module("torchvision.datasets")
    train = split == "train"
    try:
        data = datasets.CIFAR10(root or cache_folder(), train=train, download=False)
    except RuntimeError as error:  # torchvision: not found or corrupted
        if root is not None:
            raise DataError(f"{root} does not hold CIFAR-10 as torchvision stores it",
                            why=f"{root}/cifar-10-batches-py is missing or incomplete.") from error
        download("CIFAR10", split)
        data = datasets.CIFAR10(cache_folder(), train=train, download=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSource(TensorDataset(images, torch.tensor(data.targets)), 3, size, flip=True,
                       classes=_CIFAR10)


SOURCES: dict[str, Callable[[str | None, Split, int | None, bool], ImageSource]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagefolder": read_image_folder,
    "npz": read_npz,
}
