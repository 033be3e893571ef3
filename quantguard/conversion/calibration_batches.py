"""The batches of the user's data that calibration reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from ..core.errors import DataError
from ..core.nested_tensors import as_model_input, tensors_in
from ..core.runtime import seeded
from ..data.batches import require_reiterable, unpack
from ..data.holdout import reordered

_MAX_BATCHES = 16


def calibration_batches(data: Iterable[Any], model: nn.Module) -> list[Any]:
    """Return at most 16 batches of data as inputs of model, without labels.

    Raises:
        DataError: data that is empty, that can be iterated over only once, or that holds NaN or
            infinite values.
    """
    require_reiterable(data, "data")
    with seeded(0):  # a shuffling loader draws from the caller's random numbers
        batches = [as_model_input(unpack(batch)[0], model)
                   for batch in itertools.islice(_representative(data), _MAX_BATCHES)]
    for number, batch in enumerate(batches):
        for x in tensors_in(batch):
            if x.is_floating_point() and not x.isfinite().all():
                raise DataError(f"batch {number} of data holds NaN or infinite values")
    if not batches:
        raise DataError("data is empty", fix="Pass at least one batch of model inputs.")
    return batches


def _representative(data: Iterable[Any]) -> Iterable[Any]:
    """Return data in an order in which the first batches represent all of it.

    Data that is sorted by class would otherwise calibrate on its first classes only. If there are
    more batches than calibration reads, a DataLoader that reads in order is read in a seeded
    random order instead, and evenly spaced batches of a list are taken.
    """
    if isinstance(data, DataLoader):
        if type(data.sampler) is SequentialSampler and len(data) > _MAX_BATCHES:
            return reordered(data, 0)
    elif isinstance(data, (list, tuple)) and len(data) > _MAX_BATCHES:
        return [data[i * len(data) // _MAX_BATCHES] for i in range(_MAX_BATCHES)]
    return data
