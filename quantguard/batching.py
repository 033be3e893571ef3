"""Seeded batches for training, and the slice that is held out of them for the probe."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Subset,
    get_worker_info,
)

from .batches import require_reiterable, unpack
from .data import ImageSet
from .errors import DataError
from .held import Fixed, is_map_style, is_plain, known_images, reordered, some_of, unaugmented
from .running import seeded, tensors_in
from .world import world


class SeededBatches(BatchSampler):
    """Give the batches of one epoch in an order that a seed fixes, from any batch on.

    Of several processes each gets its part of every batch, unless ``parted`` is taken back.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.first = 0
        self.parted = True

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.of_epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(self.first, len(self)):
            batch = order[number * self.batch : (number + 1) * self.batch]
            yield world().part(batch) if self.parted else batch

    @property
    def of_epoch(self) -> int:
        """Return the epoch's own seed."""
        return self.seed * 1_000_003 + self.epoch

    def __len__(self) -> int:
        # A last batch of one image has no variance for BatchNorm, and every process needs one.
        rest = self.size % self.batch
        return self.size // self.batch + (rest >= max(2, world().size) or self.size < self.batch)


class _Items(Dataset[Any]):
    """Seed what a worker draws for an item by epoch and item.

    Whichever worker has it, and wherever the epoch was taken up, its augmentation is the same.
    """

    def __init__(self, items: Any, sampler: SeededBatches) -> None:
        self.items, self.sampler = items, sampler

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            seed = (self.sampler.of_epoch * 1_000_003 + index) % 2**32
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
        return self.items[index]


@dataclass
class Source:
    """Hold the training batches, and the held-out slice for the probe.

    Attributes:
        loader: the training batches.
        sampler: their order, where it is ours.
        val: the held-out slice, all of it.
        some: of it what is attacked, the same images each time; the first 512 of them are as good
            as any, whatever the order that the slice came in.
        batches: how many the loader says that it has; None: it does not say.
    """

    loader: Iterable[Any]
    sampler: SeededBatches | None
    val: Iterable[Any] | None
    batches: int | None
    some: Iterable[Any] | None = None

    @property
    def resumable(self) -> bool:
        """Return whether an epoch can be taken up in its middle."""
        return self.sampler is not None

    def count(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            DataError: none.
        """
        count = self.batches if self.batches is not None else sum(1 for _ in self.loader)
        if not count:
            raise DataError("the loader is empty", fix="Give at least one batch.")
        return count

    def epoch(self, number: int, first: int) -> Iterable[Any]:
        """Return the batches of an epoch from batch ``first`` on."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.first = number, first
            self.loader.generator.manual_seed(self.sampler.of_epoch)  # type: ignore[attr-defined]
        return self.loader

    def whole(self) -> Iterable[Any]:
        """Return the batches of the first epoch, the same in every process: what calibrates."""
        if self.sampler is not None:
            self.sampler.parted = False
        return self.epoch(0, 0)

    def described(self) -> dict[str, Any]:
        """Return what tells these batches from others: a run directory is of one data set."""
        ours = self.sampler is not None
        told: dict[str, Any] = {"first batch": _digest(lambda: self.epoch(0, 0), ours)}
        if self.val is not None:
            told["held-out images"] = _digest(lambda: self.val or (),
                                              ours or isinstance(self.val, Fixed))
        if self.sampler is None:
            return told
        items: Any = self.loader
        while hasattr(items, "dataset") or isinstance(items, _Items):
            items = items.items if isinstance(items, _Items) else items.dataset
        return {"images": self.sampler.size, "batch size": self.sampler.batch, **told,
                "augmentation": isinstance(items, ImageSet) and items.augment}


def _digest(batches: Callable[[], Iterable[Any]], ordered: bool) -> str:
    """Return a hash of a loader's first batch; of its labels alone where images are drawn anew.

    Args:
        ordered: whether the first batch is always of the same images.
    """
    def first() -> tuple[str, str]:
        with seeded(0):
            batch = next(iter(batches()), None)
        inputs, labels = (None, None) if batch is None else unpack(batch)
        return _hash(inputs), _hash(labels)
    one, other = first(), first()
    if one[0] == other[0]:
        return " ".join(one)
    return f"drawn at random {one[1]}" if ordered and one[1] == other[1] else "drawn at random"


def _hash(value: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors_in(value):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hold_out(loader: Iterable[Any], val: Iterable[Any] | None, batch: int | None,
          seed: int) -> Source:
    """Hold out a seeded 5 % (256 images at least, 20 % at most) of a map-style DataLoader.

    Its order becomes ours. One whose sampler leaves images out, or draws some more often, is taken
    as it is, but for a SubsetRandomSampler, whose images are known.

    Raises:
        DataError: a one-shot iterator, or an empty data set.
    """
    require_reiterable(loader, "the loader")
    if val is not None:
        require_reiterable(val, "val")
        val = reordered(val, seed)
    images = known_images(loader)
    if images is None or not isinstance(loader, DataLoader):
        if val is None:
            kind = "is no map-style DataLoader" if not is_map_style(loader) else \
                "is a DataLoader whose __iter__ is its own" if not is_plain(loader) else \
                "has a sampler of its own"
            warnings.warn(f"the loader {kind}, so nothing can be held out of "
                          "it: no probe picks the best epoch. Pass val= to have one.", stacklevel=3)
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        return Source(loader, None, val, batches, some_of(val, False))
    dataset: Any = loader.dataset
    size = len(images)
    if size == 0:
        raise DataError("the loader is empty", fix="Give at least one batch.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    order = [images[i] for i in order]
    held = 0
    if val is None:
        held = min(max(round(0.05 * size), 256), size // 5)
        if held:
            # in the order as it was drawn: the first of a sorted data set would be of one class
            val = DataLoader(Subset(unaugmented(dataset), order[:held]), batch_size=128,
                             collate_fn=loader.collate_fn,
                             generator=torch.Generator().manual_seed(seed))
        else:
            warnings.warn(f"{size} images are too few to hold some out: no probe picks the best "
                          "epoch. Pass val= to have one.", stacklevel=3)
    train: Any = Subset(dataset, sorted(order[held:]))
    sampler = SeededBatches(len(train), min(batch or loader.batch_size or 1, len(train)), seed)
    if loader.num_workers:
        train = _Items(train, sampler)
    return Source(DataLoader(train, batch_sampler=sampler, collate_fn=loader.collate_fn,
                              num_workers=loader.num_workers, pin_memory=loader.pin_memory,
                              worker_init_fn=loader.worker_init_fn,
                              multiprocessing_context=loader.multiprocessing_context,
                              # its own: a loader draws from it whenever it starts, and a
                              # resumed epoch starts once more than an undisturbed one
                              generator=torch.Generator()),
                   sampler, val, len(sampler), some_of(val, held > 0))
