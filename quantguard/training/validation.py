"""Validation during training: clean and attacked accuracy, levels in use, costs by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import PGD, FoolboxModel, PixelModel
from ..attacks.losses import fools
from ..core.errors import DataError
from ..core.module_utils import evaluating, frozen
from ..core.runtime import seeded
from ..core.specs import Threat
from ..data.holdout import SOME
from ..evaluation.site_sensitivity import one_float
from ..nn.contexts import bypass, listening
from ..nn.quant_activation import quantizers
from .pixel_batches import PixelBatches


class Validation(NamedTuple):
    """Clean and attacked accuracy on the held-out slice; None: there is no slice."""

    clean: float | None
    attacked: float | None
    images: int


def validate(model: PixelModel, val: Iterable[Any] | None, batches: PixelBatches, threat: Threat,
             attacked: bool, seed: int) -> Validation:
    """Return accuracies on the held-out slice: on all of it, or on about 512 images if attacked.

    The attacks go through ``sigmoid(8)`` and through the softened model. The surrogate that trains
    would overrate a model that has learned to mask it.

    Raises:
        DataError: val has no batch.
    """
    if val is None:
        return Validation(None, None, 0)
    attacks = [PGD("margin", 10, mode="sigmoid(8)", norm=threat.norm, seed=seed)]
    if quantizers(model):
        attacks.append(PGD("margin", 10, sharpness=(2, 16), norm=threat.norm, seed=seed))
    clean = robust = total = 0
    with evaluating(model), frozen(model):
        fmodel = FoolboxModel(model, threat)
        for number, batch in enumerate(val):
            x, y = batches(batch, number, "val")
            x, y = x[y >= 0], y[y >= 0]
            if not len(x):
                continue  # none of the images has a label
            with torch.no_grad():
                survivors = (~fools(model(x), y)).nonzero().flatten()
            total += len(x)
            clean += len(survivors)
            for attack in attacks if attacked else ():
                if len(survivors):
                    moved = attack.run(fmodel, x[survivors], y[survivors], epsilon=threat.eps)
                    with torch.no_grad():
                        survivors = survivors[~fools(model(moved), y[survivors])]
            robust += len(survivors)
            if attacked and total >= SOME:
                break
    if not total:
        raise DataError("val is empty", fix="Give at least one batch, or leave val= out.")
    return Validation(clean / total, robust / total, total)


def as_good(score: float, best: float, images: int) -> bool:
    """Return whether a score is within one standard error of the best one, or above it.

    So few images cannot rank such epochs, and the later one had the lower learning rate.
    """
    share = (max(best, 0.0) * images + 1) / (images + 2)  # 0 and 1 have standard errors, too
    return score >= best - math.sqrt(share * (1 - share) / (images + 2))


def accuracy_under(attack: Callable[[Tensor, Tensor], Tensor], model: PixelModel,
                   val: Iterable[Any], batches: PixelBatches) -> float:
    """Return the accuracy under an attack on about 512 held-out images."""
    right = total = 0
    with evaluating(model):
        for number, batch in enumerate(val):
            x, y = batches(batch, number, "val")
            x, y = x[y >= 0], y[y >= 0]
            if not len(x):
                continue
            with torch.no_grad():
                moved = attack(x, y)
                right += int((~fools(model(moved), y)).sum())
            total += len(x)
            if total >= SOME:
                break
    return right / max(total, 1)


def parent_accuracy(model: PixelModel, val: Iterable[Any] | None,
                    batches: PixelBatches) -> float | None:
    """Return the float parent's clean accuracy on the held-out slice."""
    with bypass(model):
        return validate(model, val, batches, model.threat, False, 0).clean


def levels_used(model: PixelModel, val: Iterable[Any], batches: PixelBatches) -> dict[str, int]:
    """Return by quantizer how many of its levels occur on the held-out slice."""
    modules = quantizers(model.model)
    seen = {name: torch.zeros(m.spec.thresholds + 1, dtype=torch.bool)
            for name, m in modules.items()}

    def listener(name: str) -> Callable[[Tensor], None]:
        def listen(z: Tensor) -> None:
            levels = modules[name].levels(z)[~z.isnan()]
            seen[name] |= torch.bincount(levels.flatten(), minlength=len(seen[name])).bool().cpu()
        return listen

    total = 0
    with evaluating(model), torch.no_grad(), \
            listening(model.model, {name: listener(name) for name in modules}):
        for number, batch in enumerate(val):
            x, _ = batches(batch, number, "val")
            model(x)
            total += len(x)
            if total >= SOME:
                break
    return {name: int(levels.sum()) for name, levels in seen.items()}


def costs(model: nn.Module, val: Iterable[Any], threat: Threat, seed: int,
          unlabelled: bool = False) -> dict[str, tuple[float, float]]:
    """Return by site the clean and attacked accuracy gained if this site alone is float.

    Args:
        unlabelled: whether images may come without a label; such images do not count.
    """
    pixel_model = PixelModel(model, threat)
    batches = PixelBatches(pixel_model, threat, unlabelled)

    def measured() -> tuple[float, float]:
        with seeded(seed):
            clean, attacked, _ = validate(pixel_model, val, batches, threat, True, seed)
        return clean or 0.0, attacked or 0.0

    whole, found = measured(), {}
    for name in quantizers(model):
        with one_float(model, name):
            clean, attacked = measured()
        found[name] = clean - whole[0], attacked - whole[1]
    return found
