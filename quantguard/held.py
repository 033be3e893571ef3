"""What is held out of training: in which order it comes, and which of it is attacked."""

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

from .batches import unpack
from .running import changed, seeded, tensors_in

# Held-out images that are attacked: where there are more, so many of them stand for all.
SOME = 512
# So many of them are put together, where they came in small batches.
_AT_ONCE = 128


def has_labels(val: Iterable[Any] | None) -> bool:
    """Return whether any of the images that there are has a label."""
    images = 0
    with seeded(0):
        for batch in val or ():
            if _labelled(batch):
                return True
            images += _images_in(batch)
    return not images


class Fixed:
    """Give the batches of a map-style DataLoader in a seeded order, the same each time.

    What its workers draw is the same each time, too.
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


class _Spread:
    """Give 512 labelled images of a loader whose order is not ours, spread over all of it.

    The first that stand in a loader may all be of one class. They are read once, and kept.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.kept is None:
            with seeded(0):
                count = sum(len(_labelled(batch)) for batch in self.loader)
            wanted = {i * count // SOME for i in range(SOME)} if count > SOME else set(range(count))
            found, before = [], 0
            with seeded(0):
                for batch in self.loader:
                    rows = _labelled(batch)
                    chosen = [row for i, row in enumerate(rows, before) if i in wanted]
                    before += len(rows)
                    rest = sorted({*range(_images_in(batch))} - {*rows})
                    # one without a label, so that who needs labels says that it has none
                    if chosen or rest:
                        found.append(_rows_of(batch, chosen + rest[:1]))
            self.kept = _together(found)
        return iter(self.kept)


def _images_in(batch: Any) -> int:
    first = next(tensors_in(unpack(batch)[0]), None)
    return len(first) if first is not None and first.dim() else 0


def _labelled(batch: Any) -> list[int]:
    """Return which images of a batch have a label."""
    _, labels = unpack(batch)
    if labels is None:
        return []
    return (labels != -1).nonzero().flatten().tolist() if labels.dim() == 1 else \
        list(range(len(labels)))


def _rows_of(batch: Any, rows: list[int]) -> tuple[Any, Tensor | None]:
    inputs, labels = unpack(batch)
    size = _images_in(batch)
    if labels is not None and len(labels) != size:
        return inputs, labels  # an error of the batch's, which is said where it is read
    return (changed(inputs, lambda x: x[rows] if x.dim() and len(x) == size else x),
            None if labels is None else labels[rows])


def _together(batches: list[Any]) -> list[Any]:
    """Put batches of alike images together: many small ones would take as many attacks."""
    found: list[Any] = []
    for inputs, labels in batches:
        last = found[-1] if found else None
        if labels is not None and last is not None and last[1] is not None \
                and isinstance(inputs, Tensor) and isinstance(last[0], Tensor) \
                and inputs.shape[1:] == last[0].shape[1:] and inputs.dtype == last[0].dtype \
                and len(last[0]) + len(inputs) <= _AT_ONCE:
            found[-1] = torch.cat([last[0], inputs]), torch.cat([last[1], labels])
        else:
            found.append((inputs, labels))
    return found


def reordered(val: Iterable[Any], seed: int) -> Iterable[Any]:
    """Return held-out batches in an order of ours, where their images are known."""
    images = known_images(val)
    return val if not images or not isinstance(val, DataLoader) else Fixed(val, images, seed)


def some_of(val: Iterable[Any] | None, ours: bool) -> Iterable[Any] | None:
    """Return held-out batches of which the first 512 images are as good as any.

    Args:
        ours: whether they come in a random order already.
    """
    return val if val is None or ours or isinstance(val, Fixed) else _Spread(val)


def unaugmented(dataset: Any) -> Any:
    """Return a data set, or subsets of one, without augmentation, where it has such a switch."""
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
    """Return whether a loader's images have numbers."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def is_plain(loader: Any) -> bool:
    """Return whether a loader's batches are what its data set and its collate_fn make."""
    return type(loader).__iter__ is DataLoader.__iter__ \
        and type(loader)._get_iterator is DataLoader._get_iterator


def known_images(loader: Iterable[Any]) -> list[int] | range | None:
    """Return which images of its data set a loader goes through, each once; None: not known."""
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
