"""Seeded batches for training, and the slice that is held out of them for the probe."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

from .batches import require_reiterable
from .errors import DataError
from .world import world


class SeededBatches(BatchSampler):
    """Give the batches of one epoch in an order that a seed fixes, from any batch on.

    Of several processes each gets its part of every batch.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(self.first, len(self)):
            yield world().part(order[number * self.batch : (number + 1) * self.batch])

    def __len__(self) -> int:
        # A last batch of one image has no variance for BatchNorm, and every process needs one.
        rest = self.size % self.batch
        return self.size // self.batch + (rest >= max(2, world().size) or self.size < self.batch)


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
        return self.loader


def hold_out(loader: Iterable[Any], val: Iterable[Any] | None, batch: int | None,
          seed: int) -> Source:
    """Hold out a seeded 5 % (256 images at least, 20 % at most) of a map-style DataLoader.

    Raises:
        DataError: a one-shot iterator, or an empty data set.
    """
    require_reiterable(loader, "the loader")
    if val is not None:
        require_reiterable(val, "val")
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) \
            or loader.batch_size is None:
        if val is None:
            warnings.warn("the loader is no map-style DataLoader, so nothing can be held out of "
                          "it: no probe picks the best epoch. Pass val= to have one.", stacklevel=3)
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        return Source(loader, None, val, batches)
    size = len(dataset)
    if size == 0:
        raise DataError("the loader is empty", fix="Give at least one batch.")
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    held = 0
    if val is None:
        held = min(max(round(0.05 * size), 256), size // 5)
        if held:
            plain = copy.copy(dataset)
            if hasattr(plain, "augment"):
                plain.augment = False
            val = DataLoader(Subset(plain, sorted(indices[:held])), batch_size=128,
                             collate_fn=loader.collate_fn,
                             generator=torch.Generator().manual_seed(seed))
    train = Subset(dataset, sorted(indices[held:]))
    sampler = SeededBatches(len(train), min(batch or loader.batch_size, len(train)), seed)
    return Source(DataLoader(train, batch_sampler=sampler, collate_fn=loader.collate_fn,
                              num_workers=loader.num_workers, pin_memory=loader.pin_memory,
                              # its own generator: a loader draws from it whenever it starts, and
                              # a resumed epoch starts once more than an undisturbed one
                              generator=torch.Generator().manual_seed(seed)),
                   sampler, val, len(sampler))
