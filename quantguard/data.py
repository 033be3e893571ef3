"""DATA -> DataLoader."""

from __future__ import annotations

import difflib
import gzip
import importlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .batches import RANGE_TOLERANCE, check_labels
from .errors import DataError, SpecError

Split = Literal["train", "test"]

DATA_HELP = ("digits | fashion-mnist[:ROOT] | mnist[:ROOT] | cifar10[:ROOT] | imagefolder:DIR "
             "(DIR/train, DIR/val) | npz:FILE (x_train, y_train, x_test, y_test)")

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class _Source:
    """Hold what a DATA spec names: items of (image (C, H, W), label), and how to augment them."""

    items: Dataset[Any]
    channels: int
    size: int | None = None  # the size still to be given to the images
    crop: bool = True  # augment by pad-and-crop
    flip: bool = False  # augment by horizontal flips


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Give (image, label): pixels in [0, 1], resized, augmented, then normalised, in this order.

    Augmentation draws from torch's random numbers: ``torch.manual_seed`` makes it reproducible.
    """

    def __init__(self, source: _Source, mean: Tensor | None, std: Tensor | None,
                 augment: bool) -> None:
        self.source, self.mean, self.std, self.augment = source, mean, std, augment

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
            from ``~/.cache/quantguard``.
        split: ``train`` (shuffled) or ``test`` (in order).
        batch_size: images per batch; the last batch may be smaller.
        size: the shorter side is resized to it, then its middle is cropped.
        mean: per channel; images are ``(pixels - mean) / std``, pixels being in [0, 1].
        std: per channel.
        augment: vary the training images: padding by an eighth of the side (at least one pixel)
            and a random crop; CIFAR-10 and image folders are also flipped at random, digits and
            npz images never, since a flip may change their meaning. Image folders with a ``size``
            above 64 get a random resized crop (35 % to all of the area) instead.

    Raises:
        SpecError: a spec or setting that cannot be meant.
        DataError: data that is missing, damaged or of the wrong form.

    Example:
        >>> images, labels = next(iter(load_data("digits", "test")))
        >>> images.shape, labels.dtype
        (torch.Size([128, 1, 8, 8]), torch.int64)
    """
    if split not in ("train", "test"):
        raise SpecError(f"split={split!r} is unknown", fix="Use train or test.")
    for name, value in (("batch_size", batch_size), ("size", 1 if size is None else size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SpecError(f"{name}={value!r} must be an integer, 1 or more")
    kind, colon, argument = spec.partition(":")
    if kind not in DATA_SPECS or (colon and not argument):
        raise SpecError(f"data {spec!r} is unknown", why=_guess(spec), fix=f"Use {DATA_HELP}.")
    augment = augment and split == "train"
    source = DATA_SPECS[kind](argument or None, split, size, augment)
    dataset: Dataset[Any] = ImageSet(source, _statistic("mean", mean, source.channels),
                                     _statistic("std", std, source.channels), augment)
    return DataLoader(dataset, batch_size=batch_size, shuffle=split == "train")


def _digits(root: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    if root is not None:
        raise SpecError(f"digits:{root}: digits is a part of scikit-learn and takes no ROOT",
                        fix="Use digits.")
    datasets = importlib.import_module("sklearn.datasets")
    selection = importlib.import_module("sklearn.model_selection")
    images, labels = datasets.load_digits(return_X_y=True)
    chosen = selection.train_test_split(images, labels, test_size=500, stratify=labels,
                                        random_state=0)
    images, labels = (chosen[0], chosen[2]) if split == "train" else (chosen[1], chosen[3])
    pixels = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    return _Source(TensorDataset(pixels, torch.from_numpy(labels)), 1, size)


def _fashion_mnist(root: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    return _idx_set("FashionMNIST", root, split, size, [DEBIAN_FASHION_MNIST])


def _mnist(root: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    return _idx_set("MNIST", root, split, size, [])


def _idx_set(name: str, root: str | None, split: Split, size: int | None,
             installed: list[Path]) -> _Source:
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
    return _Source(TensorDataset(images.unsqueeze(1), labels), 1, size)


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


def _cifar10(root: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    datasets = importlib.import_module("torchvision.datasets")
    train = split == "train"
    try:
        data = datasets.CIFAR10(root or _cache(), train=train, download=False)
    except RuntimeError as error:  # torchvision: not found or corrupted
        if root is not None:
            raise DataError(f"{root} does not hold CIFAR-10 as torchvision stores it",
                            why=f"Looked for {root}/cifar-10-batches-py. {error}") from error
        _download("CIFAR10", split)
        data = datasets.CIFAR10(_cache(), train=train, download=False)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return _Source(TensorDataset(images, torch.tensor(data.targets)), 3, size, flip=True)


def _cache() -> Path:
    return Path("~/.cache/quantguard").expanduser()


def _download(name: str, split: Split) -> None:
    """Have torchvision download to our cache; any failure becomes one DataError."""
    datasets = importlib.import_module("torchvision.datasets")
    try:
        getattr(datasets, name)(_cache(), train=split == "train", download=True)
    except Exception as error:  # the network, the disk, the mirror, a checksum
        package = "apt-get install dataset-fashion-mnist, or " if name == "FashionMNIST" else ""
        spec = {"FashionMNIST": "fashion-mnist", "MNIST": "mnist", "CIFAR10": "cifar10"}[name]
        raise DataError(f"{name} is not here and could not be downloaded to {_cache()}",
                        why=f"{type(error).__name__}: {error}",
                        fix=f"Use {package}give the folder that has it: {spec}:ROOT") from error


def _npz(file: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    if file is None:
        raise SpecError("npz needs a file", fix="Use npz:FILE.")
    import numpy as np

    keys = (f"x_{split}", f"y_{split}")
    if not Path(file).exists():
        raise DataError(f"{file} does not exist")
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
    return _Source(TensorDataset(pixels, target), images.shape[1], size)


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


def _imagefolder(root: str | None, split: Split, size: int | None, augment: bool) -> _Source:
    if root is None:
        raise SpecError("imagefolder needs a folder", fix="Use imagefolder:DIR.")
    datasets = importlib.import_module("torchvision.datasets")
    transforms = importlib.import_module("torchvision.transforms")
    folder = Path(root, "train" if split == "train" else "val")
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist",
                        fix="An image folder is DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE.")
    _check_classes(Path(root, "train"), Path(root, "val"))
    steps = [transforms.PILToTensor()]
    if augment and size is not None and size > 64:
        steps = [transforms.RandomResizedCrop(size, scale=(0.35, 1.0)), *steps]
    elif size is not None:
        steps = [transforms.Resize(size), transforms.CenterCrop(size), *steps]
    try:
        items = datasets.ImageFolder(folder, transforms.Compose(steps), loader=_open_image)
    except OSError as error:  # torchvision: no class, or a class without images
        raise DataError(f"{folder} does not hold images in class folders",
                        why=str(error)) from error
    mode = _check_folder([path for path, _ in items.samples], folder, size)
    return _Source(items, 1 if mode == "L" else 3, crop=size is None or size <= 64, flip=True)


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


def _check_folder(paths: list[str], folder: Path, size: int | None) -> str:
    """Read every image's header; return the one mode, L or RGB, that all of them have."""
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
    return rare[0]


def _open_image(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise DataError(f"{path} is not a readable image", why=str(error)) from error


DATA_SPECS: dict[str, Callable[[str | None, Split, int | None, bool], _Source]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagefolder": _imagefolder,
    "npz": _npz,
}


def _guess(spec: str) -> str:
    if os.path.isdir(spec):
        return f"It is a folder: imagefolder:{spec}?"
    if os.path.exists(spec):
        return f"It is a file: npz:{spec}?"
    near = difflib.get_close_matches(spec.partition(":")[0], DATA_SPECS, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _resize(image: Tensor, size: int) -> Tensor:
    """Resize the shorter side of (C, H, W) to ``size`` and crop the middle."""
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
    """Check a mean or std against the images; return it as (C or 1, 1, 1)."""
    if value is None:
        return None
    numbers = torch.tensor(value, dtype=torch.float32).reshape(-1)
    if len(numbers) not in (1, channels):
        raise DataError(f"{name} has {len(numbers)} numbers and the images have {channels} "
                        "channels", fix=f"Give 1 or {channels}.")
    if not numbers.isfinite().all() or (name == "std" and numbers.min() <= 0):
        raise DataError(f"{name}={value!r} must be finite" + (" and positive" * (name == "std")))
    return numbers.view(-1, 1, 1)
