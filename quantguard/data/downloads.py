"""Downloads by torchvision to a cache folder."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..core.errors import DataError
from .image_source import Split


def cache_folder() -> Path:
    """Return the folder of downloaded data sets."""
    return Path("~/.cache/quantguard").expanduser()


def download(name: str, split: Split) -> None:
    """Download a data set by torchvision to :func:`cache_folder`.

    Raises:
        DataError: any failure.
    """
    datasets = importlib.import_module("torchvision.datasets")
    try:
        getattr(datasets, name)(cache_folder(), train=split == "train", download=True)
    except Exception as error:  # the network, the disk, the mirror, a checksum
        package = " Or install it: apt-get install dataset-fashion-mnist." \
            if name == "FashionMNIST" else ""
        spec = {"FashionMNIST": "fashion-mnist", "MNIST": "mnist", "CIFAR10": "cifar10"}[name]
        raise DataError(f"{name} is not installed and could not be downloaded to {cache_folder()}",
                        why=f"{type(error).__name__}: {error}",
                        fix=f"Name the folder that has it: {spec}:ROOT.{package}") from error
