"""What a DATA spec names: where images lie, read and checked."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .batches import RANGE_TOLERANCE, check_labels
from .errors import DataError, SpecError

Split = Literal["train", "test"]

DATA_HELP = ("digits | fashion-mnist[:ROOT] | mnist[:ROOT] | cifar10[:ROOT] | imagefolder:DIR "
             "(DIR/train, DIR/val) | npz:FILE (x_train, y_train, x_test, y_test)")

# An image folder is kept in memory, once read, where all its pixels are no more bytes than this.
_KEPT = 1 << 30
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
            "truck")


@dataclass(frozen=True)
class Source:
    """Hold what a DATA spec names: items of (image (C, H, W), label), and how to augment them."""

    items: Dataset[Any]
    channels: int
    size: int | None = None  # the size still to be given to the images
    crop: bool = True  # augment by pad-and-crop
    flip: bool = False  # augment by horizontal flips
    classes: tuple[str, ...] | None = None  # their names, in the order of the labels


def _digits(root: str | None, split: Split, size: int | None, augment: bool) -> Source:
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
    return Source(TensorDataset(pixels, torch.from_numpy(labels)), 1, size, classes=_DIGITS)


def _fashion_mnist(root: str | None, split: Split, size: int | None, augment: bool) -> Source:
    return _idx_set("FashionMNIST", root, split, size, [DEBIAN_FASHION_MNIST], _FASHION)


def _mnist(root: str | None, split: Split, size: int | None, augment: bool) -> Source:
    return _idx_set("MNIST", root, split, size, [], _DIGITS)


def _idx_set(name: str, root: str | None, split: Split, size: int | None,
             installed: list[Path], classes: tuple[str, ...]) -> Source:
    """Read MNIST or Fashion-MNIST from ROOT, an installed package or our cache."""
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
        paths = find([*installed, _cache() / raw])
        if not paths:
            _download(name, split)
            paths = find([_cache() / raw])
        if not paths:
            raise DataError(f"the download of {name} left no {files[0]} in {_cache() / raw}")
    images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise DataError(f"{paths[0]} holds {len(images)} images and {paths[1]} {len(labels)} "
                        "labels")
    return Source(TensorDataset(images.unsqueeze(1), labels), 1, size, classes=classes)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read one IDX file of bytes: zero, zero, 8, the number of dimensions, their sizes, data."""
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


def _cifar10(root: str | None, split: Split, size: int | None, augment: bool) -> Source:
    datasets = importlib.import_module("torchvision.datasets")
    train = split == "train"
    try:
        data = datasets.CIFAR10(root or _cache(), train=train, download=False)
    except RuntimeError as error:  # torchvision: not found or corrupted
        if root is not None:
            raise DataError(f"{root} does not hold CIFAR-10 as torchvision stores it",
                            why=f"Looked for {root}/cifar-10-batches-py, all of it.") from error
        _download("CIFAR10", split)
        data = datasets.CIFAR10(_cache(), train=train, download=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Source(TensorDataset(images, torch.tensor(data.targets)), 3, size, flip=True,
                  classes=_CIFAR10)


def _cache() -> Path:
    return Path("~/.cache/quantguard").expanduser()


def _download(name: str, split: Split) -> None:
    """Have torchvision download to our cache; any failure becomes one DataError."""
    datasets = importlib.import_module("torchvision.datasets")
    try:
        getattr(datasets, name)(_cache(), train=split == "train", download=True)
    except Exception as error:  # the network, the disk, the mirror, a checksum
        package = " Or install it: apt-get install dataset-fashion-mnist." \
            if name == "FashionMNIST" else ""
        spec = {"FashionMNIST": "fashion-mnist", "MNIST": "mnist", "CIFAR10": "cifar10"}[name]
        raise DataError(f"{name} is not here and could not be downloaded to {_cache()}",
                        why=f"{type(error).__name__}: {error}",
                        fix=f"Name the folder that has it: {spec}:ROOT.{package}") from error


def _npz(file: str | None, split: Split, size: int | None, augment: bool) -> Source:
    if file is None:
        raise SpecError("npz needs a file", fix="Use npz:FILE.")
    import numpy as np

    keys = (f"x_{split}", f"y_{split}")
    if not Path(file).is_file():
        raise DataError(f"{file} is no file" if Path(file).exists() else f"{file} does not exist",
                        fix="Use npz:FILE.")
    with open(file, "rb") as content:
        if content.read(4) not in (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUM"):
            raise DataError(f"{file} is no npz file", why="It is no zip of arrays.",
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
    return Source(TensorDataset(pixels, target), images.shape[1], size)


def _check_npz_images(images: Any, where: str) -> None:
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


def _imagefolder(root: str | None, split: Split, size: int | None, augment: bool) -> Source:
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
    small = len(items) * channels * pixels <= _KEPT
    return Source(_Kept(items) if small and not varied else items, channels, crop=not varied,
                  flip=True, classes=tuple(items.classes))


class _Kept(Dataset[Any]):
    """Keep each item of a dataset once it was read: decoding a small image takes as long as a step.

    Args:
        items: (image, label) by index, always the same ones.
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
    """Check that both parts, where there are both, number their classes alike."""
    if not (train.is_dir() and val.is_dir()):
        return
    names = [{entry.name for entry in os.scandir(part) if entry.is_dir()} for part in (train, val)]
    extra = ((train, names[0] - names[1]), (val, names[1] - names[0]))
    problems = [f"only in {part}: {', '.join(sorted(only)[:5])}" + ", ..." * (len(only) > 5)
                for part, only in extra if only]
    if problems:
        raise DataError(f"{train} and {val} do not hold the same classes", why="; ".join(problems),
                        fix="A class's number is its place in the sorted names, so both need all.")


def _check_folder(paths: list[str], folder: Path, size: int | None) -> tuple[str, int]:
    """Read every image's header; return the one mode, L or RGB, that all have, and their pixels.

    The latter is the number of pixels of one image as it will be given.
    """
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
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise DataError(f"{path} is not a readable image", why=str(error)) from error


SOURCES: dict[str, Callable[[str | None, Split, int | None, bool], Source]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagefolder": _imagefolder,
    "npz": _npz,
}
