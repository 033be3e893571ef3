"""BatchNorm statistics: estimated again before training, unless the layer is frozen."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.model_calls import run
from ..core.module_utils import modes_restored
from ..core.nested_tensors import as_model_input, tensors_in
from ..core.runtime import seeded
from ..data.batches import unpack
from .pixel_batches import STATISTICS_BATCHES, of_several


def is_frozen(norm: nn.Module) -> bool:
    """Return whether all weights of a BatchNorm are frozen; then its statistics are, too."""
    weights = list(norm.parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)


def reestimate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Estimate the statistics of BatchNorms that are not frozen from a loader's first images.

    Conversion changes the activations, so the statistics that came with the weights do not fit.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats
             and not is_frozen(m)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), modes_restored(model), seeded(0):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over batches
        try:
            whole = 0
            read = (as_model_input(unpack(batch)[0], model)
                    for batch in itertools.islice(loader, STATISTICS_BATCHES))
            for inputs in of_several(read, _images_in):
                images = _images_in(inputs)
                whole = max(whole, images)
                if 2 * images > whole:  # a small last batch would weigh as much as a full one
                    run(model, inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _images_in(inputs: Any) -> int:
    return len(next(iter(tensors_in(inputs))))
