"""Held-out images: their order, and the subset that validation attacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from ..core.nested_tensors import changed, tensors_in
from ..core.runtime import seeded
from .batches import unpack

# The number of held-out images that are attacked, if there are more.
SOME = 512
# Small batches are merged up to this size.
_MERGED_SIZE = 128


def has_labels(val: Iterable[Any] | None) -> bool:
    """Return whether any image has a label, or there are no images."""
    images = 0
    with seeded(0):
        for batch in val or ():
            if _labelled_rows(batch):
                return True
            images += _images_in(batch)
    return not images


class FixedOrder:
    """Batches of a map-style DataLoader in a seeded order, the same in every pass.

    The random numbers of its workers are the same in every pass, too.
    """

    def __init__(self, loader: DataLoader[Any], images: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator).tolist()
        options: dict[str, Any] = {} if not loader.num_workers else {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers}
        self.seed = seed
        self.loader: DataLoader[Any] = DataLoader(
            Subset(loader.dataset, [images[i] for i in order]), batch_size=loader.batch_size,
            collate_fn=loader.collate_fn, num_workers=loader.num_workers,
            pin_memory=loader.pin_memory, drop_last=loader.drop_last, timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context, generator=generator, **options)

    def __iter__(self) -> Iterator[Any]:
        self.loader.generator.manual_seed(self.seed)
        return iter(self.loader)


class _SpreadSample:
    """512 labelled images of a loader whose order is unknown, spread over all of it.

    The first images of a loader may all be of one class. The images are read once and stored.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.stored: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.stored is None:
            with seeded(0):
                count = sum(len(_labelled_rows(batch)) for batch in self.loader)
            wanted = {i * count // SOME for i in range(SOME)} if count > SOME else set(range(count))
            found, before = [], 0
            with seeded(0):
                for batch in self.loader:
                    rows = _labelled_rows(batch)
                    chosen = [row for i, row in enumerate(rows, before) if i in wanted]
                    before += len(rows)
                    rest = sorted({*range(_images_in(batch))} - {*rows})
                    # One unlabelled image stays, so that code that needs labels reports it.
                    if chosen or rest:
                        found.append(_rows_of(batch, chosen + rest[:1]))
            self.stored = _merge_small_batches(found)
        return iter(self.stored)


def _images_in(batch: Any) -> int:
    """Return the number of images of a batch."""
    first = next(tensors_in(unpack(batch)[0]), None)
    return len(first) if first is not None and first.dim() else 0


def _labelled_rows(batch: Any) -> list[int]:
    """Return the indices of the images of a batch that have a label."""
    _, labels = unpack(batch)
    if labels is None:
        return []
    return (labels != -1).nonzero().flatten().tolist() if labels.dim() == 1 else \
        list(range(len(labels)))


def _rows_of(batch: Any, rows: list[int]) -> tuple[Any, Tensor | None]:
    """Return some images of a batch with their labels."""
    inputs, labels = unpack(batch)
    size = _images_in(batch)
    if labels is not None and len(labels) != size:
        return inputs, labels  # a malformed batch: its reader raises the error
    return (changed(inputs, lambda x: x[rows] if x.dim() and len(x) == size else x),
            None if labels is None else labels[rows])


def _merge_small_batches(batches: list[Any]) -> list[Any]:
    """Return batches with small ones of equal images merged: each batch takes an attack."""
    found: list[Any] = []
    for inputs, labels in batches:
        last = found[-1] if found else None
        if labels is not None and last is not None and last[1] is not None \
                and isinstance(inputs, Tensor) and isinstance(last[0], Tensor) \
                and inputs.shape[1:] == last[0].shape[1:] and inputs.dtype == last[0].dtype \
                and len(last[0]) + len(inputs) <= _MERGED_SIZE:
            found[-1] = torch.cat([last[0], inputs]), torch.cat([last[1], labels])
        else:
            found.append((inputs, labels))
    return found


def reordered(val: Iterable[Any], seed: int) -> Iterable[Any]:
    """Return batches in a seeded order if their images are known, else unchanged."""
    images = known_images(val)
    return val if not images or not isinstance(val, DataLoader) else FixedOrder(val, images, seed)


def attack_subset(val: Iterable[Any] | None, shuffled: bool) -> Iterable[Any] | None:
    """Return held-out batches whose first 512 images represent all of them.

    Args:
        val: the held-out batches.
        shuffled: whether they are in random order already.
    """
    return val if val is None or shuffled or isinstance(val, FixedOrder) else _SpreadSample(val)


def unaugmented(dataset: Any) -> Any:
    """Return a data set, or a subset of one, without augmentation if it has the switch for it."""
    if isinstance(vars(dataset).get("augment") if hasattr(dataset, "__dict__") else None, bool):
        dataset = copy.copy(dataset)
        dataset.augment = False
    elif isinstance(dataset, Subset):
        inner = unaugmented(dataset.dataset)
        if inner is not dataset.dataset:
            dataset = copy.copy(dataset)
            dataset.dataset = inner
    return dataset


def is_map_style(loader: Iterable[Any]) -> bool:
    """Return whether the images of a loader have indices."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def is_plain(loader: Any) -> bool:
    """Return whether a DataLoader has torch's own iterator, not an overridden one."""
    return type(loader).__iter__ is DataLoader.__iter__ \
        and type(loader)._get_iterator is DataLoader._get_iterator


def known_images(loader: Iterable[Any]) -> list[int] | range | None:
    """Return the indices of the images of a loader, each once; None: they are not known."""
    if not isinstance(loader, DataLoader) or not is_map_style(loader) \
            or not is_plain(loader) or loader.batch_size is None:
        return None
    sampler: Any = loader.sampler
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    if type(sampler) is RandomSampler:
        every = range(len(sampler.data_source))
        return every if not sampler.replacement and sampler.num_samples == len(every) else None
    indices = list(sampler.indices) if type(sampler) is SubsetRandomSampler else None
    return indices if indices is not None and len(set(indices)) == len(indices) else None
