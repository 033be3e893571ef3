"""MNIST and Fashion-MNIST, from files in the IDX format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..core.errors import DataError
from .downloads import cache_folder, download
from .image_source import ImageSource, Split


def read_idx_dataset(name: str, root: str | None, split: Split, size: int | None,
                     installed: list[Path], classes: tuple[str, ...]) -> ImageSource:
    """Read MNIST or Fashion-MNIST from ROOT, an installed package or the cache.

    Args:
        name: of torchvision's class.
        root: the folder of the files; None: look in the others, and download where they lack them.
        split: train or test.
        size: to which the images are resized later.
        installed: folders of installed packages.
        classes: class names.
    """
    raw = Path(name, "raw")
    part = "train" if split == "train" else "t10k"
    files = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")

    def find(folders: list[Path]) -> list[Path]:
        for folder in folders:
            found = [path for file in files for path in (folder / file, folder / f"{file}.gz")
                     if path.is_file()]
            if len({path.name.removesuffix(".gz") for path in found}) == 2:
                return [found[0], found[-1]]
        return []

    if root is not None:
        places = [Path(root), Path(root) / raw]
        paths = find(places)
        if not paths:
            raise DataError(f"{root} does not hold {files[0]} and {files[1]}, plain or .gz",
                            why=f"Looked in {', '.join(map(str, places))}.")
    else:
        paths = find([*installed, cache_folder() / raw])
        if not paths:
            download(name, split)
            paths = find([cache_folder() / raw])
        if not paths:
            raise DataError(f"the download of {name} left no {files[0]} in {cache_folder() / raw}")
    images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise DataError(f"{paths[0]} holds {len(images)} images and {paths[1]} {len(labels)} "
                        "labels")
    return ImageSource(TensorDataset(images.unsqueeze(1), labels), 1, size, classes=classes)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of bytes: 0, 0, 8, the number of dimensions, their sizes, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read", why=f"{type(error).__name__}: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise DataError(f"{path} is not an IDX file of bytes in {dimensions} dimensions",
                        why=f"It starts with {content[:4].hex(' ') or 'nothing'}.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape) or not content[start:]:
        raise DataError(f"{path} is damaged or empty",
                        why=f"Its header says {shape}, and {len(content) - start} bytes follow.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
