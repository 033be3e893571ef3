"""Seeded batches for training, and the slice that is held out of them for the probe."""

from __future__ import annotations

import copy
import hashlib
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    get_worker_info,
)

from .batches import require_reiterable, unpack
from .errors import DataError
from .running import seeded
from .world import world


class SeededBatches(BatchSampler):
    """Give the batches of one epoch in an order that a seed fixes, from any batch on.

    Of several processes each gets its part of every batch.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.of_epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(self.first, len(self)):
            yield world().part(order[number * self.batch : (number + 1) * self.batch])

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
    """Hold the training batches, and the held-out slice for the probe."""

    loader: Iterable[Any]
    sampler: SeededBatches | None
    val: Iterable[Any] | None
    batches: int | None

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

    def described(self) -> dict[str, Any]:
        """Return what tells these batches from others: a run directory is of one data set."""
        if self.sampler is None:
            return {}
        with seeded(0):
            labels = next((unpack(batch)[1] for batch in self.epoch(0, 0)), None)
        told = "none" if labels is None else hashlib.blake2b(
            labels.cpu().contiguous().numpy().tobytes(), digest_size=8).hexdigest()
        items: Any = self.loader
        while hasattr(items, "dataset") or isinstance(items, _Items):
            items = items.items if isinstance(items, _Items) else items.dataset
        return {"images": self.sampler.size, "batch size": self.sampler.batch,
                "labels of the first batch": told,
                "augmentation": bool(getattr(items, "augment", False))}


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
    images = _images(loader)
    if images is None or not isinstance(loader, DataLoader):
        if val is None:
            kind = "has a sampler of its own" if _is_map_style(loader) else \
                "is no map-style DataLoader"
            warnings.warn(f"the loader {kind}, so nothing can be held out of "
                          "it: no probe picks the best epoch. Pass val= to have one.", stacklevel=3)
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        return Source(loader, None, val, batches)
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
            plain = copy.copy(dataset)
            if hasattr(plain, "augment"):
                plain.augment = False
            val = DataLoader(Subset(plain, sorted(order[:held])), batch_size=128,
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
                   sampler, val, len(sampler))


def _is_map_style(loader: Iterable[Any]) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _images(loader: Iterable[Any]) -> list[int] | range | None:
    """Return which images of its data set a loader goes through, each once; None: not known."""
    if not isinstance(loader, DataLoader) or not _is_map_style(loader) or loader.batch_size is None:
        return None
    dataset: Any = loader.dataset
    every, sampler = range(len(dataset)), loader.sampler
    if type(sampler) is SequentialSampler:
        return every
    if type(sampler) is RandomSampler:
        return every if not sampler.replacement and sampler.num_samples == len(every) else None
    return list(sampler.indices) if type(sampler) is SubsetRandomSampler else None
