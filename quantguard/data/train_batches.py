"""Seeded batches for training, and images held out of training for validation."""

from __future__ import annotations

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
    Subset,
    get_worker_info,
)

from ..core.distributed import distributed
from ..core.errors import DataError
from .batches import require_reiterable
from .fingerprint import first_batch_fingerprint
from .holdout import (
    FixedOrder,
    attack_subset,
    is_map_style,
    is_plain,
    known_images,
    reordered,
    unaugmented,
)
from .loader import ImageSet


class SeededBatches(BatchSampler):
    """Batches of one epoch in a seeded order, which can start at any batch.

    In distributed training each process gets its shard of every batch while ``sharded`` is set.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.first = 0
        self.sharded = True

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch_seed)
        order = torch.randperm(self.size, generator=generator).tolist()
        for number in range(self.first, len(self)):
            batch = order[number * self.batch : (number + 1) * self.batch]
            yield distributed().shard(batch) if self.sharded else batch

    @property
    def epoch_seed(self) -> int:
        """Return the seed of the current epoch."""
        return self.seed * 1_000_003 + self.epoch

    def __len__(self) -> int:
        # A last batch of one image has no variance for BatchNorm, and every process needs one.
        rest = self.size % self.batch
        return self.size // self.batch + (
            rest >= max(2, distributed().size) or self.size < self.batch
        )


class _SeededItems(Dataset[Any]):
    """Dataset that seeds the random numbers of a worker by epoch and item.

    The augmentation of an item then depends neither on the worker nor on the first batch of a
    resumed epoch.
    """

    def __init__(self, items: Any, sampler: SeededBatches) -> None:
        self.items, self.sampler = items, sampler

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            seed = (self.sampler.epoch_seed * 1_000_003 + index) % 2**32
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
        return self.items[index]


@dataclass
class Source:
    """Training batches, and held-out batches for validation.

    Attributes:
        loader: the training batches.
        sampler: their order; None: the loader's own order is used.
        val: all held-out batches.
        batches: the number of batches of the loader; None: it has no length.
        some: held-out batches whose first 512 images, the attacked ones, represent all of them.
    """

    loader: Iterable[Any]
    sampler: SeededBatches | None
    val: Iterable[Any] | None
    batches: int | None
    some: Iterable[Any] | None = None

    @property
    def resumable(self) -> bool:
        """Return whether an epoch can start at any batch."""
        return self.sampler is not None

    def count(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            DataError: there are none.
        """
        count = self.batches if self.batches is not None else sum(1 for _ in self.loader)
        if not count:
            raise DataError("the loader is empty", fix="Give at least one batch.")
        return count

    def epoch(self, number: int, first: int) -> Iterable[Any]:
        """Return the batches of an epoch from batch ``first`` on."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.first = number, first
            self.loader.generator.manual_seed(self.sampler.epoch_seed)  # type: ignore[attr-defined]
        return self.loader

    def whole(self) -> Iterable[Any]:
        """Return the first epoch's batches for calibration: whole batches in every process.

        ``sharded`` stays off afterwards.
        """
        if self.sampler is not None:
            self.sampler.sharded = False
        return self.epoch(0, 0)

    def described(self) -> dict[str, Any]:
        """Return a description of the data, by which a run directory recognises its data set."""
        seeded = self.sampler is not None
        described: dict[str, Any] = {
            "first batch": first_batch_fingerprint(lambda: self.epoch(0, 0), seeded)}
        if self.val is not None:
            described["held-out images"] = first_batch_fingerprint(
                lambda: self.val or (), seeded or isinstance(self.val, FixedOrder))
        if self.sampler is None:
            return described
        items: Any = self.loader
        while hasattr(items, "dataset") or isinstance(items, _SeededItems):
            items = items.items if isinstance(items, _SeededItems) else items.dataset
        return {"images": self.sampler.size, "batch size": self.sampler.batch, **described,
                "augmentation": isinstance(items, ImageSet) and items.augment}


def hold_out(loader: Iterable[Any], val: Iterable[Any] | None, batch: int | None,
             seed: int) -> Source:
    """Take 5 % of a map-style DataLoader's images out of training, drawn by a seed.

    At least 256 images are held out, and at most 20 %. The rest is trained on in a seeded order. A
    loader with another sampler than torch's sequential, random or subset sampler is used unchanged,
    since its images are not known.

    Args:
        loader: the training batches.
        val: batches to validate on; None: they are held out of ``loader``.
        batch: the batch size; None: the loader's.
        seed: of the held-out images and of the training order.

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
            kind = "is not a map-style DataLoader" if not is_map_style(loader) else \
                "is a DataLoader with its own __iter__" if not is_plain(loader) else \
                "has a sampler of its own"
            warnings.warn(f"the loader {kind}, so nothing can be held out of it and no validation "
                          "selects the best epoch. Pass val= for one.", stacklevel=3)
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        return Source(loader, None, val, batches, attack_subset(val, False))
    dataset: Any = loader.dataset
    size = len(images)
    if size == 0:
        raise DataError("the loader is empty", fix="Give at least one batch.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    order = [images[i] for i in order]
    num_held_out = 0
    if val is None:
        num_held_out = min(max(round(0.05 * size), 256), size // 5)
        if num_held_out:
            # In random order: the first images of a sorted data set would be of one class.
            val = DataLoader(Subset(unaugmented(dataset), order[:num_held_out]), batch_size=128,
                             collate_fn=loader.collate_fn,
                             generator=torch.Generator().manual_seed(seed))
        else:
            warnings.warn(f"{size} images are too few to hold some out, and no validation selects "
                          "the best epoch. Pass val= for one.", stacklevel=3)
    train: Any = Subset(dataset, sorted(order[num_held_out:]))
    sampler = SeededBatches(len(train), min(batch or loader.batch_size or 1, len(train)), seed)
    if loader.num_workers:
        train = _SeededItems(train, sampler)
    return Source(DataLoader(train, batch_sampler=sampler, collate_fn=loader.collate_fn,
                              num_workers=loader.num_workers, pin_memory=loader.pin_memory,
                              worker_init_fn=loader.worker_init_fn,
                              multiprocessing_context=loader.multiprocessing_context,
                              # Its own generator: a loader draws from it at every start, and a
                              # resumed run has one start more.
                              generator=torch.Generator()),
                   sampler, val, len(sampler), attack_subset(val, num_held_out > 0))
